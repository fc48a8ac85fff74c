"""What the three writers of samples share.

All make the same file, in global order: what a reader sees does not tell how it was written, or by how many ranks.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from ddpatch.decomposition import Decomposition
from ddpatch.errors import UserError
from ddpatch.io.journal import Journal
from ddpatch.io.volume import VolumeHeader, create_fields, publish, refuse_existing, temporary_path
from ddpatch.parallel.comm import Communicator

NAME = "fields"


class VolumeWriter(ABC):
    """Writes samples that are spread over the ranks into one HDF5 file; a context manager.

    The file gets its name when it is closed. After a failure nothing has that name, or what had it before still has it. Samples
    that were committed before a failure are kept in the unfinished file: the next writer of the same series finds them.

    Arguments:
        path: The file.
        header: Shape, names and provenance of its samples.
        decomposition: Who owns which patch.
        comm: The ranks of the decomposition.
        overwrite: Whether an existing file may be replaced, or one of another series that was not finished.

    Attributes:
        finished: Numbers of the samples that need not be written: they are on the disk.

    Raises:
        UserError: on all ranks, if the file exists and may not be replaced, or its folder cannot be written.
    """

    mode: str
    any_ranks = True  # whether a series may go on with another number of ranks

    def __init__(
        self, path: str | Path, header: VolumeHeader, decomposition: Decomposition, comm: Communicator, overwrite: bool = False
    ) -> None:
        if header.grid_shape != decomposition.grid_shape or decomposition.size != comm.size:
            raise ValueError(f"{header} and {decomposition} on {comm.size} ranks do not belong together")
        self.path, self.header, self.decomposition, self.comm = Path(path), header, decomposition, comm
        self.overwrite = overwrite
        self._temporary, self._folder = temporary_path(self.path), temporary_path(ranks_folder(self.path))
        self._local = decomposition.local_patches(comm.rank)
        self._written: set[int] = set()
        self._file: Any = None
        self._dataset: Any = None  # held, so that closing it cannot be where a write fails
        self._journal = Journal(self.path.with_name(f".{self.path.name}.journal"), self._series())
        self.finished: set[int] = comm.on_root(self._look_back)
        with self._named():
            self._start()
        comm.barrier()
        comm.on_root(self._begin)

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
        with self._named(f"sample {sample} "):
            self._write(sample, torch.as_tensor(patches).detach().cpu().to(getattr(torch, self.header.dtype)).contiguous())
        self._written.add(sample)

    def commit(self) -> None:
        """Keep what was written so far, whatever happens next. Collective."""
        with self._named():
            self._flush()
        self.comm.barrier()
        self.comm.on_root(lambda: self._journal.add(self._written - self.finished))
        self.finished |= self._written

    def close(self) -> None:
        """Complete the file and give it its name. Collective.

        Raises:
            ValueError: if a sample was not written. Nothing has the name then.
        """
        try:
            missing = set(range(self.header.samples)) - self._written - self.finished
            if missing:
                raise ValueError(f"{self.path}: samples {sorted(missing)} were not written")
            with self._named():
                self._finish()
            self.comm.on_root(self._journal.remove)
        except BaseException:
            self._abandon()
            raise

    @abstractmethod
    def _remains(self) -> bool:
        """Whether the files of an unfinished series are there; on rank 0."""

    @abstractmethod
    def _start(self) -> None:
        """Create this rank's files, or open them where samples are finished. Collective."""

    @abstractmethod
    def _write(self, sample: int, patches: Tensor) -> None:
        """Write this rank's patches of one sample. Collective."""

    @abstractmethod
    def _flush(self) -> None:
        """Force what this rank wrote to the disk. Collective."""

    @abstractmethod
    def _finish(self) -> None:
        """Complete the file and publish it. Collective."""

    @abstractmethod
    def _close(self) -> None:
        """Close what this rank opened, after a failure and without communication: other ranks may not know of it."""

    @abstractmethod
    def _remove(self) -> None:
        """Remove what this rank made, likewise."""

    def _abandon(self) -> None:
        with suppress(OSError, RuntimeError):  # what could not be written may not be closed either
            self._close()
        if self.finished:
            return
        if self.comm.rank == 0:
            self._journal.remove()
        self._remove()

    def _series(self) -> dict[str, Any]:
        """What has to be equal for a series to go on: the checkpoint of a run stands for its configuration."""
        header = {**vars(self.header), **self.header.attributes}
        return {"mode": self.mode, "ranks": None if self.any_ranks else self.comm.size} | {
            name: value for name, value in header.items() if name not in ("attributes", "ranks", "config")
        }

    def _look_back(self) -> set[int]:
        """The samples of an unfinished file of this series; what else is unfinished is removed, another series only if asked."""
        refuse_existing(self.path, self.overwrite)
        finished = self._journal.finished()
        difference = self._journal.difference() if finished else ""
        if finished and not difference and self._remains():
            return finished
        if difference and not self.overwrite:
            raise UserError(
                f"{self.path}: an unfinished series with {len(finished)} samples is here, with {difference}; "
                "finish it as it was begun, take another name, or replace it with overwrite"
            )
        self._temporary.unlink(missing_ok=True)
        remove_folder(self._folder)
        return set()

    def _begin(self) -> None:
        if not self.finished:
            self._journal.begin()

    def _create(self) -> None:
        self._file = h5py.File(self._temporary, "w")
        self._dataset = create_fields(self._file, self.header, NAME)
        self._file.flush()

    def _publish(self) -> None:
        publish(self._temporary, self.path)
        if self.overwrite:
            remove_folder(ranks_folder(self.path))

    @contextmanager
    def _named(self, what: str = "") -> Iterator[None]:
        """Let what the file system or HDF5 refuse name the file."""
        try:
            yield
        except UserError:
            raise
        except (OSError, RuntimeError) as error:
            raise UserError(f"{self.path}: cannot write {what}on rank {self.comm.rank}: {_reason(error)}") from None


def let_go(file: h5py.File) -> None:
    """Close a file that is given up, also if the disk does not take what HDF5 still holds in memory.

    HDF5 would try again at every handle that is closed, last when the interpreter ends, and fail where no one can catch it.
    """
    try:
        file.flush()
    except (OSError, RuntimeError):
        with Path(os.devnull).open("r+b") as nowhere:
            os.dup2(nowhere.fileno(), file.id.get_vfd_handle())
    file.close()


def _reason(error: Exception) -> str:
    """What the system said, without HDF5's account of it."""
    text = " ".join(str(error).split())
    found = re.search(r"error message = '([^']+)'", text)
    return found[1] if found else text


def ranks_folder(path: Path) -> Path:
    """The folder with the ranks' files of a joint file."""
    return path.with_name(f"{path.name}.ranks")


def rank_name(rank: int) -> str:
    """The name of a rank's file."""
    return f"rank_{rank:05d}.h5"


def remove_folder(folder: Path) -> None:
    """Remove a folder of ranks' files, unless the user keeps something else in it."""
    for path in folder.glob("rank_*.h5"):
        path.unlink(missing_ok=True)
    with suppress(OSError):  # there is none, or the user keeps something else in it
        folder.rmdir()
