"""Samples written by all ranks into one file, through parallel HDF5."""

from __future__ import annotations

import h5py
import numpy as np
from torch import Tensor

from ddpatch.errors import UserError
from ddpatch.io.volume import sync
from ddpatch.io.writer import NAME, VolumeWriter


class MpioWriter(VolumeWriter):
    """All ranks write into one file together, through an h5py that was built with MPI: for parallel file systems."""

    mode = "mpio"

    def _remains(self) -> bool:
        return self._temporary.exists()

    def _start(self) -> None:
        if not h5py.get_config().mpi:
            raise UserError(
                "output.mode: mpio needs an h5py that was built with MPI, which this one is not; use gather or virtual"
            )
        if not self.finished:
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

    def _flush(self) -> None:
        self._file.flush()
        sync(self._temporary)

    def _finish(self) -> None:
        self._dataset = None
        self._file.close()
        self.comm.on_root(self._publish)

    def _close(self) -> None:
        self._dataset = None  # the file stays open: closing it would wait for ranks that may have failed

    def _remove(self) -> None:
        if self.comm.rank == 0:
            self._temporary.unlink(missing_ok=True)
