"""Mean, standard deviation and short-range covariance of the training fields, read a piece at a time by all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ddpatch.data.fields import FieldFile
from ddpatch.decomposition import block_range
from ddpatch.errors import UserError
from ddpatch.parallel.comm import Communicator

PIECE = 2**22  # numbers in memory at a time
STENCIL_BOX = 32  # points per axis


@dataclass(frozen=True)
class Normalisation:
    """The affine map between physical and normalised fields: x = mean + std x̃, per channel.

    Arguments:
        mean, std: One number per channel.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalise(self, x: Tensor) -> Tensor:
        """Physical to normalised, with shape ``[..., channel, *points]`` where ``points`` has the axes of the grid."""
        mean, std = self._columns(x)
        return (x - mean) / std

    def restore(self, x: Tensor) -> Tensor:
        """Normalised to physical, with shape ``[sample, patch, channel, *points]``."""
        mean, std = self._columns(x)
        return torch.addcmul(mean, x, std)

    def _columns(self, x: Tensor) -> tuple[Tensor, Tensor]:
        points = (1,) * (x.ndim - 3)
        return x.new_tensor(self.mean).view(-1, *points), x.new_tensor(self.std).view(-1, *points)


def measure_normalisation(file: FieldFile, samples: Sequence[int], kind: str, comm: Communicator) -> Normalisation:
    """Mean and deviation over samples and points. Collective.

    Arguments:
        file: The fields.
        samples: Samples to read.
        kind: ``joint``: the means, and one deviation for all channels, the root mean square fluctuation per channel; it keeps a
            solenoidal vector solenoidal. ``channel``: a deviation for each channel.
        comm: Ranks that share the reading.

    Raises:
        UserError: if a channel is constant.
    """
    channels = len(file.header.channels)
    sums = torch.zeros(2 * channels, dtype=torch.float64)
    for rows in _rows(file, samples, comm):
        values = torch.from_numpy(rows).to(torch.float64).flatten(1)
        sums += torch.cat([values.sum(1), values.square().sum(1)])
    count = len(samples) * math.prod(file.header.grid_shape)
    mean, square = (comm.allreduce_(sums) / count).split(channels)
    variance = square - mean.square()
    if float(variance.min()) <= 1e-12 * float(square.max()):
        flat = file.header.channels[int(variance.argmin())]
        raise UserError(f"{file.path}: channel '{flat}' is constant over the training samples; nothing can be learnt of it")
    if kind == "joint":
        variance = variance.mean().expand(channels)
    return Normalisation(tuple(mean.tolist()), tuple(variance.sqrt().tolist()))


def _rows(file: FieldFile, samples: Sequence[int], comm: Communicator) -> Iterator[np.ndarray]:
    """This rank's rows of axis 0, as many at a time as fit into a bounded piece of memory."""
    grid = file.header.grid_shape
    rows, rest = block_range(grid[0], comm.size, comm.rank), (0,) * (len(grid) - 1)
    step = max(1, PIECE // (len(file.header.channels) * math.prod(grid[1:])))
    for sample in samples:
        for first in rows[::step]:
            yield file.read(sample, (first, *rest), (min(step, rows.stop - first), *grid[1:]))


def measure_stencil(file: FieldFile, samples: Sequence[int], normalisation: Normalisation, comm: Communicator) -> Tensor:
    """Covariance of the normalised fields on 3^d neighbouring points, over a box of each sample. Collective.

    Arguments:
        file: The fields.
        samples: Samples to read; they are dealt out to the ranks.
        normalisation: Applied to what is read.
        comm: Ranks that share the reading.

    Returns:
        Shape ``[channel 3^d, channel 3^d]``, double precision; stencils are ordered as the weights of a convolution.
    """
    grid = file.header.grid_shape
    size = len(file.header.channels) * 3 ** len(grid)
    sums = torch.zeros(size * size + 1, dtype=torch.float64)
    shape = [min(n, STENCIL_BOX) for n in grid]
    for sample in list(samples)[comm.rank :: comm.size]:
        box = torch.from_numpy(file.read(sample, (0,) * len(grid), shape)).to(torch.float64)
        stencils = normalisation.normalise(box[None, None])[0, 0]
        for axis in range(1, 1 + len(grid)):
            stencils = stencils.unfold(axis, 3, 1)
        rows = stencils.movedim(0, len(grid)).flatten(len(grid)).flatten(0, len(grid) - 1)
        sums += torch.cat([(rows.T @ rows).flatten(), torch.tensor([float(len(rows))])])
    *covariance, count = comm.allreduce_(sums).split([size * size, 1])
    return covariance[0].view(size, size) / count
