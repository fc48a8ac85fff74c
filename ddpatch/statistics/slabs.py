"""How the statistics read fields: crops of a file, and a rank's rows of one axis in pieces bounded in memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ddpatch.io.volume import VolumeHeader

PIECE_VALUES = 2**20  # values of one piece without its ring: 8 MiB in double precision


class Fields(Protocol):
    """Anything that is read like a :class:`ddpatch.data.fields.FieldFile`."""

    @property
    def header(self) -> VolumeHeader:
        """What the fields are."""

    def read(self, sample: int, start: Sequence[int], shape: Sequence[int], channels: Sequence[int] | None = None) -> np.ndarray:
        """The box of one sample, with shape ``[channel, *shape]``."""


@dataclass(frozen=True)
class Crops:
    """Fields cut into non-overlapping boxes, each of them a sample; an axis that is cut is not periodic.

    Arguments:
        fields: The fields to cut.
        grid_shape: Points of one box, at most those of the fields. What is left over at the far ends is not used.
    """

    fields: Fields
    grid_shape: tuple[int, ...]

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Number of boxes along each axis."""
        return tuple(n // g for n, g in zip(self.fields.header.grid_shape, self.grid_shape, strict=True))

    @cached_property
    def header(self) -> VolumeHeader:
        """The header of the boxes."""
        whole = self.fields.header
        periodic = tuple(p and n == g for p, n, g in zip(whole.periodic, whole.grid_shape, self.grid_shape, strict=True))
        samples = whole.samples * math.prod(self.counts)
        return dataclasses.replace(whole, samples=samples, grid_shape=self.grid_shape, periodic=periodic)

    def read(self, sample: int, start: Sequence[int], shape: Sequence[int], channels: Sequence[int] | None = None) -> np.ndarray:
        """A box of one crop, with shape ``[channel, *shape]``."""
        number, crop = divmod(sample, math.prod(self.counts))
        place = np.unravel_index(crop, self.counts)
        origin = [int(i) * g + s for i, g, s in zip(place, self.grid_shape, start, strict=True)]
        return self.fields.read(number, origin, shape, channels)


class Piece(NamedTuple):
    """Some rows of one axis of one sample, complete along all other axes.

    Attributes:
        values: The rows and their ring, in double precision, with shape ``[channel, *shape]``.
        core: The rows without the ring.
        rows: The numbers of the core rows.
    """

    values: Tensor
    core: Tensor
    rows: range


def pieces(fields: Fields, sample: int, axis: int, rows: range, ring: int = 0, periodic: bool = True) -> Iterator[Piece]:
    """Read rows of one axis in pieces bounded in memory.

    Arguments:
        fields: Where to read.
        sample: Number of the sample.
        axis: The axis whose rows are dealt out; all others are complete.
        rows: The rows to read, one rank's share.
        ring: Width of the rows around each piece, wrapped on a periodic axis and cut off at walls.
        periodic: Whether the axis is taken as periodic.
    """
    header = fields.header
    shape, start = list(header.grid_shape), [0] * len(header.grid_shape)
    points = shape[axis]
    step = max(1, PIECE_VALUES // (len(header.channels) * math.prod(shape) // points))
    for first in range(rows.start, rows.stop, step):
        own = range(first, min(first + step, rows.stop))
        low, high = own.start - ring, own.stop + ring
        if not periodic:
            low, high = max(low, 0), min(high, points)
        start[axis], shape[axis] = low, high - low
        values = torch.from_numpy(np.asarray(fields.read(sample, start, shape), dtype=np.float64))
        yield Piece(values, values.narrow(1 + axis, own.start - low, len(own)), own)
