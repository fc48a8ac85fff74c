"""Samples written by one rank."""

from __future__ import annotations

from torch import Tensor

from ddpatch.io.writer import NAME, VolumeWriter


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
