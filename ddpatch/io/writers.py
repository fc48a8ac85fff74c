"""One file of samples, written by many ranks in one of three ways.

All three make the same file, in global order: what a reader sees does not tell how it was written, or by how many ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from ddpatch.decomposition import Decomposition
from ddpatch.errors import UserError, nearest
from ddpatch.io.volume import VolumeHeader, create_fields, publish, refuse_existing, sync, temporary_path
from ddpatch.parallel.comm import Communicator

NAME = "fields"


class VolumeWriter(ABC):
    """Writes samples that are spread over the ranks into one HDF5 file; a context manager.

    The file gets its name when it is closed. After a failure nothing has that name, or what had it before still has it.

    Arguments:
        path: The file.
        header: Shape, names and provenance of its samples.
        decomposition: Who owns which patch.
        comm: The ranks of the decomposition.
        overwrite: Whether an existing file may be replaced.

    Raises:
        UserError: on all ranks, if the file exists and may not be replaced, or its folder cannot be written.
    """

    def __init__(
        self, path: str | Path, header: VolumeHeader, decomposition: Decomposition, comm: Communicator, overwrite: bool = False
    ) -> None:
        if header.grid_shape != decomposition.grid_shape or decomposition.size != comm.size:
            raise ValueError(f"{header} and {decomposition} on {comm.size} ranks do not belong together")
        self.path, self.header, self.decomposition, self.comm = Path(path), header, decomposition, comm
        self.overwrite = overwrite
        self._temporary = temporary_path(self.path)
        self._local = decomposition.local_patches(comm.rank)
        self._written: set[int] = set()
        self._file: Any = None
        comm.on_root(self._refuse_existing)
        self._start()

    def __enter__(self) -> VolumeWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._abandon()

    def write(self, sample: int, patches: Tensor | np.ndarray) -> None:
        """Write one sample. Collective.

        Arguments:
            sample: Number of the sample.
            patches: This rank's patches, with shape ``[local patch, channel, *patch_shape]``.
        """
        expected = (len(self._local), len(self.header.channels), *self.decomposition.patch_shape)
        if tuple(patches.shape) != expected:
            raise ValueError(f"patches of shape {tuple(patches.shape)}, expected {expected}")
        self._write(sample, torch.as_tensor(patches).detach().cpu().to(getattr(torch, self.header.dtype)).contiguous())
        self._written.add(sample)

    def close(self) -> None:
        """Complete the file and give it its name. Collective.

        Raises:
            ValueError: if a sample was not written. Nothing has the name then.
        """
        try:
            missing = set(range(self.header.samples)) - self._written
            if missing:
                raise ValueError(f"{self.path}: samples {sorted(missing)} were not written")
            self._finish()
        except BaseException:
            self._abandon()
            raise

    @abstractmethod
    def _start(self) -> None:
        """Create this rank's files. Collective."""

    @abstractmethod
    def _write(self, sample: int, patches: Tensor) -> None:
        """Write this rank's patches of one sample. Collective."""

    @abstractmethod
    def _finish(self) -> None:
        """Complete the file and publish it. Collective."""

    @abstractmethod
    def _abandon(self) -> None:
        """Remove what this rank made, without communication: other ranks may not know of the failure."""

    def _refuse_existing(self) -> None:
        refuse_existing(self.path, self.overwrite)

    def _create(self) -> None:
        self._file = h5py.File(self._temporary, "w")
        create_fields(self._file, self.header, NAME)

    def _publish(self) -> None:
        publish(self._temporary, self.path)
        if self.overwrite:
            _remove_folder(ranks_folder(self.path))


class GatherWriter(VolumeWriter):
    """Rank 0 writes, and holds no more than one patch of the others: works everywhere, as fast as one rank can write."""

    def _start(self) -> None:
        self.comm.on_root(self._create)

    def _write(self, sample: int, patches: Tensor) -> None:
        for patch, values in enumerate(self.comm.gather_rows(patches, self.decomposition.counts)):
            box = (sample, slice(None), *self.decomposition.slices(patch))
            self._file[NAME][box] = values.numpy()

    def _finish(self) -> None:
        self.comm.on_root(self._complete)

    def _complete(self) -> None:
        self._file.close()
        self._publish()

    def _abandon(self) -> None:
        if self._file is not None:
            self._file.close()
            self._temporary.unlink(missing_ok=True)


class VirtualWriter(VolumeWriter):
    """Every rank writes a file of its own, and rank 0 a virtual dataset that joins them: no rank waits for another.

    The ranks' files lie in the folder ``<file>.ranks`` beside the joint file, which names them relative to itself: the two move
    together.
    """

    def _start(self) -> None:
        self._folder = temporary_path(ranks_folder(self.path))
        self._own_path = self._folder / rank_name(self.comm.rank)
        self.comm.on_root(self._make_folder)
        self._file = h5py.File(self._own_path, "w")
        dataset = self._file.create_dataset(NAME, self._rank_shape(self.comm.rank), self.header.dtype)
        dataset.attrs["patches"] = np.asarray(self._local)
        self.comm.barrier()  # a rank that fails from here on must not find the folder empty and remove it

    def _make_folder(self) -> None:
        final = ranks_folder(self.path)
        if final.exists() and not self.overwrite:
            raise UserError(f"{final}: exists already, and is only replaced with overwrite")
        _remove_folder(self._folder)
        self._folder.mkdir()

    def _rank_shape(self, rank: int) -> tuple[int, ...]:
        count = self.decomposition.counts[rank]
        return self.header.samples, count, len(self.header.channels), *self.decomposition.patch_shape

    def _write(self, sample: int, patches: Tensor) -> None:
        self._file[NAME][sample] = patches.numpy()

    def _finish(self) -> None:
        self._file.close()
        sync(self._own_path)
        self.comm.barrier()
        self.comm.on_root(self._join)

    def _join(self) -> None:
        with h5py.File(self._temporary, "w") as joint:
            create_fields(joint, self.header, NAME, self._layout())
        final = ranks_folder(self.path)
        if self.overwrite:
            self.path.unlink(missing_ok=True)  # an old joint file must not find new numbers behind its names
            _remove_folder(final)
        sync(self._folder)
        self._folder.rename(final)
        publish(self._temporary, self.path)

    def _layout(self) -> h5py.VirtualLayout:
        layout = h5py.VirtualLayout(self.header.shape, self.header.dtype)
        for rank in range(self.comm.size):
            source = h5py.VirtualSource(f"{ranks_folder(self.path).name}/{rank_name(rank)}", NAME, self._rank_shape(rank))
            for place, patch in enumerate(self.decomposition.local_patches(rank)):
                box = (slice(None), slice(None), *self.decomposition.slices(patch))
                layout[box] = source[:, place]
        return layout

    def _abandon(self) -> None:
        if self._file is not None:
            self._file.close()
        self._own_path.unlink(missing_ok=True)
        if self.comm.rank == 0:
            self._temporary.unlink(missing_ok=True)
        with suppress(OSError):  # the last rank to leave finds the folder empty
            self._folder.rmdir()


class MpioWriter(VolumeWriter):
    """All ranks write into one file together, through an h5py that was built with MPI: for parallel file systems."""

    def _start(self) -> None:
        if not h5py.get_config().mpi:
            raise UserError(
                "output.mode: mpio needs an h5py that was built with MPI, which this one is not; use gather or virtual"
            )
        self.comm.on_root(self._prepare)
        self._file = h5py.File(self._temporary, "r+", driver="mpio", comm=self.comm.raw)
        self._dataset = self._file[NAME]
        self._collective = h5py.h5p.create(h5py.h5p.DATASET_XFER)
        self._collective.set_dxpl_mpio(h5py.h5fd.MPIO_COLLECTIVE)

    def _prepare(self) -> None:
        self._create()  # by one rank: parallel HDF5 cannot write strings of variable length
        self._file.close()

    def _write(self, sample: int, patches: Tensor) -> None:
        values = patches.numpy()
        for place in range(max(self.decomposition.counts)):
            self._write_patch(sample, self._local[place : place + 1], values[place : place + 1])

    def _write_patch(self, sample: int, patch: range, values: np.ndarray) -> None:
        """Write one patch, or none: every rank takes part in every round. Collective."""
        space = self._dataset.id.get_space()
        memory = h5py.h5s.create_simple((1, len(self.header.channels), *self.decomposition.patch_shape))
        if patch:
            space.select_hyperslab((sample, 0, *self.decomposition.start(patch[0])), memory.get_simple_extent_dims())
        else:
            space.select_none()
            memory.select_none()
            values = np.empty(memory.get_simple_extent_dims(), self.header.dtype)
        self._dataset.id.write(memory, space, values, dxpl=self._collective)

    def _finish(self) -> None:
        self._dataset = None
        self._file.close()
        self.comm.on_root(self._publish)

    def _abandon(self) -> None:
        self._dataset = None  # parallel HDF5 refuses to close a file before its datasets
        if self.comm.rank == 0:  # the file stays open: closing it would wait for ranks that may have failed
            self._temporary.unlink(missing_ok=True)


WRITERS: dict[str, type[VolumeWriter]] = {"gather": GatherWriter, "virtual": VirtualWriter, "mpio": MpioWriter}


def open_writer(
    path: str | Path,
    header: VolumeHeader,
    decomposition: Decomposition,
    comm: Communicator,
    mode: str = "auto",
    overwrite: bool = False,
) -> VolumeWriter:
    """Open the writer of a mode; ``auto`` is gather on one rank, on several mpio where h5py has it, else virtual. Collective.

    Raises:
        UserError: if the file exists and may not be replaced, or the mode is not known or not available.
    """
    if mode == "auto":
        parallel = "mpio" if h5py.get_config().mpi else "virtual"
        mode = "gather" if comm.size == 1 else parallel
    if mode not in WRITERS:
        raise UserError(f"output.mode: expected auto, {', '.join(WRITERS)}, got '{mode}'{nearest(mode, WRITERS)}")
    return WRITERS[mode](path, header, decomposition, comm, overwrite)


def ranks_folder(path: Path) -> Path:
    """The folder with the ranks' files of a joint file."""
    return path.with_name(f"{path.name}.ranks")


def rank_name(rank: int) -> str:
    """The name of a rank's file."""
    return f"rank_{rank:05d}.h5"


def _remove_folder(folder: Path) -> None:
    for path in folder.glob("rank_*.h5"):
        path.unlink(missing_ok=True)
    with suppress(OSError):  # there is none, or the user keeps something else in it
        folder.rmdir()
