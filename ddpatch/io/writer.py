"""What the three writers of samples share.

All make the same file, in global order: what a reader sees does not tell how it was written, or by how many ranks.
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
from ddpatch.io.volume import VolumeHeader, create_fields, publish, refuse_existing, temporary_path
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
            remove_folder(ranks_folder(self.path))


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
