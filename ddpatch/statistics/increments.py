"""Increments along an axis: structure functions, flatness, and histograms in fixed bins.

All functions take *lines*: the values along one axis of some rows of the grid, with shape ``[channel, line, point]``, and return
sums that add up over rows, samples and ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

POWERS = (2, 3, 4)
BINS, REACH = 121, 12.1  # bins of width 0.2 over ±12.1 standard deviations, one of them centred on 0; the outermost keep the rest


def separations(points: int) -> tuple[int, ...]:
    """The distances in points at which increments are measured: 1, 2, 3, 4, 6, 8, 12, 16, ... up to half the grid."""
    series = sorted({2**i for i in range(31)} | {3 * 2**i for i in range(30)})
    return tuple(r for r in series if r <= points // 2)


def lines_along(values: Tensor, axis: int) -> Tensor:
    """The lines along a grid axis, ``[channel, line, point]``, of values with shape ``[channel, *shape]``."""
    return values.movedim(1 + axis, -1).flatten(1, -2)


def pairs(lines: Tensor, distance: int, periodic: bool) -> tuple[Tensor, Tensor]:
    """The values at x and at x + distance for all x of a line, around the end of a periodic axis."""
    if periodic:
        return lines, lines.roll(-distance, -1)
    points = lines.shape[-1]
    return lines[..., : points - distance], lines[..., distance:]


def increment_sums(lines: Tensor, distances: Sequence[int], periodic: bool) -> Tensor:
    """The sums behind structure functions S_p(r) = <|δu|^p> with δu = u(x + r) - u(x).

    Returns:
        Sums of |δu|², |δu|³, |δu|⁴, δu³ and 1, with shape ``[distance, 5]``.
    """
    sums = torch.zeros((len(distances), 5), dtype=torch.float64)
    for i, distance in enumerate(distances):
        near, far = pairs(lines, distance, periodic)
        jump = far - near
        square = jump.square()
        cube = square * jump
        parts = [square.sum(), cube.abs().sum(), square.square().sum(), cube.sum()]
        sums[i] = torch.stack([*parts, torch.tensor(float(jump.numel()), dtype=torch.float64)])
    return sums


def increment_histogram(lines: Tensor, distances: Sequence[int], scales: Sequence[float], periodic: bool) -> Tensor:
    """The number of increments in every bin, in units of one scale per distance, with shape ``[distance, bin]``."""
    counts = torch.zeros((len(distances), BINS), dtype=torch.float64)
    for i, (distance, scale) in enumerate(zip(distances, scales, strict=True)):
        near, far = pairs(lines, distance, periodic)
        counts[i] = histogram(far - near, scale)
    return counts


def histogram(values: Tensor, scale: float) -> Tensor:
    """The number of values in every bin, in units of ``scale``; the outermost bins hold all beyond them. Shape ``[bin]``."""
    width = 2 * REACH / BINS
    places = ((values.flatten() / scale + REACH) / width).floor().clamp(0, BINS - 1).long()
    return torch.bincount(places, minlength=BINS).to(torch.float64)


def bin_centres() -> Tensor:
    """The centres of the bins in units of the scale, with shape ``[bin]``."""
    return (torch.arange(BINS, dtype=torch.float64) + 0.5) * (2 * REACH / BINS) - REACH
