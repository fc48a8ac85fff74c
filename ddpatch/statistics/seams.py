"""Do patches show? Jumps by position in the patch lattice, two-point correlation within and across patches, and patch means.

*Lines* are values along one axis with shape ``[channel, line, point]``. All sums add up over rows, samples and ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpatch.decomposition import Index
from ddpatch.statistics.increments import pairs


def jump_sums(lines: Tensor, patch: int, periodic: bool) -> Tensor:
    """The squared first and second differences by position in the patch.

    Position i of the first differences is the pair (i, i + 1), so that the last position straddles the border. Position i of the
    second differences u(i - 1) - 2 u(i) + u(i + 1) is the middle point, so that the first and the last straddle it.

    Returns:
        Sums over channels and lines, and counts, with shape ``[order, position, 2]``.
    """
    near, far = pairs(lines, 1, periodic)
    first = far - near
    second = first - first.roll(1, -1) if periodic else first[..., 1:] - first[..., :-1]
    sums = torch.zeros((2, patch, 2), dtype=torch.float64)
    for order, (jumps, offset) in enumerate([(first, 0), (second, 0 if periodic else 1)]):
        positions = (torch.arange(jumps.shape[-1]) + offset) % patch
        weight = float(jumps.shape[0] * jumps.shape[1])
        sums[order, :, 0].index_add_(0, positions, jumps.square().sum((0, 1)))
        sums[order, :, 1].index_add_(0, positions, torch.full(positions.shape, weight, dtype=torch.float64))
    return sums


def seam_ratios(jumps: Tensor) -> Tensor:
    """The seam ratios J and J2 of one axis.

        J = <|u(x + 1) - u(x)|²> across patch borders / the same inside patches,

    and J2 with second differences, which also see a kink. Both are 1 where the patches do not show.

    Arguments:
        jumps: Sums of :func:`jump_sums`, with shape ``[order, position, 2]``.

    Returns:
        Shape ``[2]``; NaN where a patch has no inside.
    """
    patch = jumps.shape[1]
    ratios = []
    for order in range(2):
        border = torch.zeros(patch, dtype=torch.bool)
        border[[-1] if order == 0 else [0, -1]] = True
        seam, inside = jumps[order, border].sum(0), jumps[order, ~border].sum(0)
        ratios.append((seam[0] / seam[1]) / (inside[0] / inside[1]))
    return torch.stack(ratios)


def pair_sums(lines: Tensor, patch: int, distances: Sequence[int], periodic: bool) -> Tensor:
    """The sums behind the correlation of pairs (x, x + r) within one patch, and of pairs with a patch border between them.

    Returns:
        Sums of u u', u, u', u², u'² and 1, with shape ``[distance, 2, channel, 6]``: first within, then across.
    """
    sums = torch.zeros((len(distances), 2, lines.shape[0], 6), dtype=torch.float64)
    profile, power = lines.sum(1), lines.square().sum(1)
    for i, distance in enumerate(distances):
        near, far = pairs(lines, distance, periodic)
        left, right = pairs(profile, distance, periodic)
        counts = torch.full_like(left, float(lines.shape[1]))
        parts = torch.stack([(near * far).sum(1), left, right, *pairs(power, distance, periodic), counts], -1)
        across = (torch.arange(left.shape[-1]) % patch) + distance >= patch
        sums[i] = torch.stack([parts[:, ~across].sum(1), parts[:, across].sum(1)])
    return sums


def pearson(sums: Tensor) -> Tensor:
    """The correlation coefficient of pairs (a, b).

    Each side has its own mean and variance, so that few pairs of a field that is not uniform are not mistaken for weak coupling.

    Arguments:
        sums: Sums of a b, a, b, a², b² and 1, with shape ``[..., 6]``.

    Returns:
        Shape ``[...]``; NaN where there are no pairs.
    """
    product, a, b, square_a, square_b, _ = (sums / sums[..., 5:]).unbind(-1)
    return (product - a * b) / ((square_a - a**2) * (square_b - b**2)).sqrt()


def patch_sums(values: Tensor, first_row: int, patch: Index, patch_grid: Index) -> Tensor:
    """The sums over the points of every patch that lie in some rows of axis 0, with shape ``[channel, *patch_grid]``.

    Arguments:
        values: The rows, with shape ``[channel, row, ...]``.
        first_row: Number of the first of them.
        patch, patch_grid: Points of a patch, and patches of the grid.
    """
    for axis in range(1, len(patch)):
        shape = values.shape
        values = values.reshape(*shape[: 1 + axis], patch_grid[axis], patch[axis], *shape[2 + axis :]).sum(2 + axis)
    rows = torch.arange(first_row, first_row + values.shape[1]) // patch[0]
    sums = torch.zeros((values.shape[0], *patch_grid), dtype=torch.float64)
    return sums.index_add_(1, rows, values)


def neighbour_sums(means: Tensor, periodic: Sequence[bool]) -> Tensor:
    """The sums behind the correlation of the means of neighbouring patches.

    Arguments:
        means: The mean of every patch, with shape ``[channel, *patch_grid]``.
        periodic: Whether the patch grid closes on itself along each axis.

    Returns:
        Sums of a b, a, b, a², b² and 1 over neighbours along each axis, with shape ``[axis, channel, 6]``; 0 along an axis with
        a single patch.
    """
    sums = torch.zeros((len(periodic), len(means), 6), dtype=torch.float64)
    for axis, wraps in enumerate(periodic):
        if means.shape[1 + axis] > 1:
            a, b = (side.flatten(1) for side in pairs(means.movedim(1 + axis, -1), 1, wraps))
            parts = [a * b, a, b, a * a, b * b, torch.ones_like(a)]
            sums[axis] = torch.stack([part.sum(1) for part in parts], -1)
    return sums
