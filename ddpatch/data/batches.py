"""Batches of patches for training: which sample, where its origin lies, and the read of the own boxes."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ddpatch.data.fields import FieldFile
from ddpatch.data.normalisation import Normalisation
from ddpatch.decomposition import Decomposition
from ddpatch.errors import UserError
from ddpatch.random import Stream, generator


class PatchBatches:
    """Reads the own patches of any draw. Draw n of a run is the same on any number of ranks.

    Every epoch goes once through the samples in a random order. With ``shift`` a draw has a random origin: anywhere on periodic
    axes, and anywhere the crop fits on axes where the grid is smaller than the file's.

    Arguments:
        file: The fields.
        samples: Samples to draw from.
        decomposition: The grid of one draw and its patches.
        patches: Own patches.
        normalisation: Applied to what is read.
        seed: Of the run.
        shift: Draw origins at random.

    Attributes:
        seconds: Wall time spent reading.
    """

    def __init__(
        self,
        file: FieldFile,
        samples: Sequence[int],
        decomposition: Decomposition,
        patches: Sequence[int],
        normalisation: Normalisation,
        seed: int,
        shift: bool,
    ) -> None:
        self.file, self.samples, self.decomposition, self.patches = file, samples, decomposition, patches
        self.normalisation, self.seed, self.shift = normalisation, seed, shift
        self.seconds = 0.0
        self._epoch, self._order = -1, np.empty(0, int)

    def read(self, draws: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Normalised own patches of some draws, with shape ``[draw, local patch, channel, *patch_shape]``."""
        start = time.perf_counter()
        boxes = []
        for draw in draws:
            sample, origin = self.sample(draw), self.origin(draw)
            for patch in self.patches:
                corner = [o + s for o, s in zip(origin, self.decomposition.start(patch), strict=True)]
                boxes.append(torch.from_numpy(self.file.read(sample, corner, self.decomposition.patch_shape)))
        stacked = torch.stack(boxes).unflatten(0, (len(draws), len(self.patches))).to(dtype)
        self.seconds += time.perf_counter() - start
        return self.normalisation.normalise(stacked)

    def sample(self, draw: int) -> int:
        """The sample of a draw."""
        epoch, place = divmod(draw, len(self.samples))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, generator(self.seed, Stream.ORDER, epoch).permutation(len(self.samples))
        return self.samples[int(self._order[place])]

    def origin(self, draw: int) -> tuple[int, ...]:
        """The grid index in the file where the draw's grid begins."""
        grid, full = self.decomposition.grid_shape, self.file.header.grid_shape
        if not self.shift:
            return (0,) * len(grid)
        ranges = [n if wraps else n - m + 1 for m, n, wraps in zip(grid, full, self.file.header.periodic, strict=True)]
        return tuple(int(i) for i in generator(self.seed, Stream.SHIFT, draw).integers(ranges))


def check_grid(file: FieldFile, grid_shape: Sequence[int], periodic: Sequence[bool]) -> None:
    """Raise a UserError unless the file can fill the grid, and close on itself where the grid does."""
    full = file.header.grid_shape
    if len(full) != len(grid_shape) or any(m > n for m, n in zip(grid_shape, full, strict=False)):
        raise UserError(f"domain.grid: {list(grid_shape)} does not fit into the fields of {file.path}, {list(full)}")
    if len(periodic) != len(full):
        raise UserError(f"domain.periodic: expected {len(full)} values, one per axis, got {list(periodic)}")
    for axis, (m, n, wraps, closes) in enumerate(zip(grid_shape, full, periodic, file.header.periodic, strict=True)):
        if wraps and not (closes and m == n):
            why = "is not periodic in the file" if not closes else f"covers {m} of the {n} points of the file"
            raise UserError(f"domain.periodic: axis {axis} cannot be periodic, it {why}")
