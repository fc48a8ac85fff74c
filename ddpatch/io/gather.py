"""Samples written by one rank."""

from __future__ import annotations

import h5py
from torch import Tensor

from ddpatch.io.volume import sync
from ddpatch.io.writer import NAME, VolumeWriter, let_go


class GatherWriter(VolumeWriter):
    """Rank 0 writes, and holds no more than one patch of the others: works everywhere, as fast as one rank can write."""

    mode = "gather"

    def _remains(self) -> bool:
        return self._temporary.exists()

    def _start(self) -> None:
        self.comm.on_root(self._open if self.finished else self._create)

    def _open(self) -> None:
        self._file = h5py.File(self._temporary, "r+")
        self._dataset = self._file[NAME]

    def _write(self, sample: int, patches: Tensor) -> None:
        for patch, values in enumerate(self.comm.gather_rows(patches, self.decomposition.counts)):
            box = (sample, slice(None), *self.decomposition.slices(patch))
            self._dataset[box] = values.numpy()

    def _flush(self) -> None:
        if self._file is not None:
            self._file.flush()
            sync(self._temporary)

    def _finish(self) -> None:
        self.comm.on_root(self._complete)

    def _complete(self) -> None:
        self._file.close()
        self._publish()

    def _close(self) -> None:
        if self._file is not None:
            let_go(self._file)

    def _remove(self) -> None:
        if self._file is not None:
            self._temporary.unlink(missing_ok=True)
