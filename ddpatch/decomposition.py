"""The grid cut into patches, and the patches given to ranks: integers only, no communication.

A *patch* is an owned box of the grid, numbered row-major over the patch grid (last axis fastest). A *rank* is only where a
patch lives: rank r owns a contiguous, balanced range of patch numbers. Every question can be answered for any rank, on any
rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from ddpatch.errors import UserError

Index = tuple[int, ...]


def block_range(count: int, size: int, rank: int) -> range:
    """The balanced share of ``count`` items that belongs to ``rank`` of ``size``: contiguous, equal up to one item."""
    quotient, remainder = divmod(count, size)
    start = rank * quotient + min(rank, remainder)
    return range(start, start + quotient + (rank < remainder))


@dataclass(frozen=True)
class Decomposition:
    """A grid of points cut into equal patches that ``size`` ranks own.

    Arguments:
        grid_shape: Points of the global grid, ``([nz,] ny, nx)``.
        patch_shape: Points of one patch, dividing the grid on every axis.
        size: Number of ranks that share the grid.
        periodic: Per axis, whether the grid closes on itself. Default: periodic on all axes.

    Raises:
        UserError: if a patch does not divide the grid, or if a rank would own no patch.
    """

    grid_shape: Index
    patch_shape: Index
    size: int = 1
    periodic: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        if not self.periodic:
            object.__setattr__(self, "periodic", (True,) * len(self.grid_shape))
        if not len(self.grid_shape) == len(self.patch_shape) == len(self.periodic):
            raise UserError(
                f"domain: grid {list(self.grid_shape)}, patch {list(self.patch_shape)} and periodic {list(self.periodic)} "
                "must have the same number of axes"
            )
        if any(p < 1 or n < 1 or n % p for n, p in zip(self.grid_shape, self.patch_shape, strict=True)):
            raise UserError(f"domain.patch: {list(self.patch_shape)} does not divide domain.grid {list(self.grid_shape)}")
        if self.size > self.num_patches:
            raise UserError(
                f"{self.size} ranks for {self.num_patches} patches: every rank must own a patch; "
                "start at most as many ranks as patches, or choose a smaller domain.patch"
            )

    @property
    def ndim(self) -> int:
        """Number of axes of the grid."""
        return len(self.grid_shape)

    @cached_property
    def patch_grid(self) -> Index:
        """Number of patches along each axis."""
        return tuple(n // p for n, p in zip(self.grid_shape, self.patch_shape, strict=True))

    @property
    def num_patches(self) -> int:
        """Number of patches of the whole grid."""
        return math.prod(n // p for n, p in zip(self.grid_shape, self.patch_shape, strict=True))

    @property
    def num_points(self) -> int:
        """Number of points of the whole grid."""
        return math.prod(self.grid_shape)

    def position(self, patch: int) -> Index:
        """The place of a patch in the patch grid."""
        place = []
        for n in reversed(self.patch_grid):
            patch, i = divmod(patch, n)
            place.append(i)
        return tuple(reversed(place))

    def patch_at(self, position: Index) -> int | None:
        """The patch at a place of the patch grid, wrapped on periodic axes; ``None`` outside a wall."""
        patch = 0
        for i, n, wraps in zip(position, self.patch_grid, self.periodic, strict=True):
            if not wraps and not 0 <= i < n:
                return None
            patch = patch * n + i % n
        return patch

    def start(self, patch: int) -> Index:
        """The grid index of a patch's first point."""
        return tuple(i * p for i, p in zip(self.position(patch), self.patch_shape, strict=True))

    def slices(self, patch: int) -> tuple[slice, ...]:
        """The box of a patch in the global grid."""
        return tuple(slice(s, s + p) for s, p in zip(self.start(patch), self.patch_shape, strict=True))

    @cached_property
    def offsets(self) -> tuple[Index, ...]:
        """The 3^d - 1 directions to the neighbours of a patch, row-major."""
        return tuple(o for o in product((-1, 0, 1), repeat=self.ndim) if any(o))

    def neighbour(self, patch: int, offset: Index) -> int | None:
        """The patch in direction ``offset``; ``None`` beyond a wall. On a short periodic axis it may be the patch itself."""
        return self.patch_at(tuple(i + o for i, o in zip(self.position(patch), offset, strict=True)))

    def local_patches(self, rank: int) -> range:
        """The patches that ``rank`` owns."""
        return block_range(self.num_patches, self.size, rank)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Number of patches of every rank."""
        return tuple(len(self.local_patches(rank)) for rank in range(self.size))

    def owner(self, patch: int) -> int:
        """The rank that owns a patch."""
        quotient, remainder = divmod(self.num_patches, self.size)
        wide = remainder * (quotient + 1)
        return patch // (quotient + 1) if patch < wide else remainder + (patch - wide) // quotient
