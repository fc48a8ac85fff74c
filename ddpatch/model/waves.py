"""What the linear part knows of the modes of a token grid: spectrum, and what means, stencils and splines make of a wave."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpatch.model.tokens import neighbours, spline_weights, weighting

DEGREE = 5  # of the splines of the linear part: what they make of a wave has other waves in it, which lower degrees damp less


class Waves(NamedTuple):
    """What the coarse level knows of the modes of one token grid, those of ``torch.fft.rfftn``.

    Attributes:
        values, vectors: P = U diag(p) U^H, with shapes ``[*modes, channel]`` and ``[*modes, channel, channel]``.
        phases: exp(i θ r) for the displacements r of the stencil, per axis: ``[2 δ + 1, mode]``.
        mean, noise: B and A of means, ``[*modes]``; B is 0 for waves that the tokens do not resolve.
        spline, square: S and R of splines, ``[*modes]``.
        weight: Modes of the whole spectrum that a mode stands for, per point of the grid, ``[*modes]``.
        angles: θ per axis, ``[mode]``.
    """

    values: Tensor
    vectors: Tensor
    phases: tuple[Tensor, ...]
    mean: Tensor
    noise: Tensor
    spline: Tensor
    square: Tensor
    weight: Tensor
    angles: tuple[Tensor, ...]


def make_waves(token_grid: Sequence[int], cell: Sequence[int], reach: Sequence[int], power: Tensor, grid: Sequence[int]) -> Waves:
    """The modes of a token grid, in double precision.

    Arguments:
        token_grid: Tokens per axis.
        cell: Points of a token's cell per axis.
        reach: δ of the stencil and of the means per axis.
        power: P_ab(k), with shape ``[channel, channel, *(2 K + 1), K + 1, 2]``.
        grid: Points of the grid whose wave numbers these are; P is interpolated where the tokens' grid is another.
    """
    kernels = [weighting(m, n) for m, n in zip(cell, reach, strict=True)]
    numbers = [torch.fft.fftfreq(n, 1 / n, dtype=torch.float64) for n in token_grid[:-1]]
    numbers.append(torch.arange(token_grid[-1] // 2 + 1, dtype=torch.float64))
    angles = [2 * math.pi * k / (n * m) for k, n, m in zip(numbers, token_grid, cell, strict=True)]
    modes = torch.view_as_complex(power)
    for axis, (angle, points) in enumerate(zip(angles, grid, strict=True), start=2):
        first = modes.shape[axis] // 2 if axis < modes.ndim - 1 else 0
        modes = interpolate(modes, axis, angle * points / (2 * math.pi) + first)
    values, vectors = torch.linalg.eigh(modes.movedim((0, 1), (-2, -1)))
    phases = phase_factors(reach, angles)
    resolved = _outer([(2 * k.abs() < n).double() for k, n in zip(numbers, token_grid, strict=True)])
    mean = _outer([_transfer(h, angle) for h, angle in zip(kernels, angles, strict=True)]) * resolved
    noise = _outer([_noise(h, angle, m) for h, angle, m in zip(kernels, angles, cell, strict=True)])
    spline, square = zip(*(_spline(angle, m) for angle, m in zip(angles, cell, strict=True)), strict=True)
    alone = _outer([*(torch.ones_like(k) for k in numbers[:-1]), (numbers[-1] == 0).double()])
    weight = (2 - alone) / math.prod(n * m for n, m in zip(token_grid, cell, strict=True))
    return Waves(values.clamp(min=0), vectors, phases, mean, noise, _outer(spline), _outer(square), weight, tuple(angles))


def interpolate(values: Tensor, dim: int, places: Tensor) -> Tensor:
    """Linear interpolation along a dim, at places in units of its entries."""
    places = places.clamp(0, values.shape[dim] - 1)
    low = places.floor().clamp(max=max(values.shape[dim] - 2, 0)).long()
    share = (places - low).view([-1 if i == dim else 1 for i in range(values.ndim)])
    high = (low + 1).clamp(max=values.shape[dim] - 1)
    return values.index_select(dim, low) * (1 - share) + values.index_select(dim, high) * share


def phase_factors(most: Sequence[int], angles: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """exp(i θ r) for displacements r up to ``most``, per axis: ``[2 most + 1, mode]``."""
    lengths = [torch.arange(-n, n + 1, dtype=torch.float64)[:, None] for n in most]
    return tuple(torch.exp(1j * r * angle) for r, angle in zip(lengths, angles, strict=True))


def _transfer(kernel: Tensor, angle: Tensor) -> Tensor:
    """What a symmetric kernel makes of a wave with phase 0 in its middle."""
    points = torch.arange(len(kernel)).to(angle) - (len(kernel) - 1) / 2
    return (angle[:, None] * points).cos() @ kernel


def _noise(kernel: Tensor, angle: Tensor, cell: int) -> Tensor:
    """The variance of white noise after the kernel, at every m-th point, relative to that before: 1 for a mean over m points."""
    repeated = F.conv1d(kernel[None, None], kernel[None, None], padding=len(kernel) - 1)[0, 0]
    middle = len(kernel) - 1
    kept = slice(middle % cell, None, cell)
    return cell * (angle[:, None] * (torch.arange(len(repeated)) - middle)[kept]).cos() @ repeated[kept]


def _spline(angle: Tensor, cell: int) -> tuple[Tensor, Tensor]:
    """What splines make of a wave on the tokens: the amplitude of that wave at the points, and the mean square of all of it."""
    points = torch.arange(cell).to(angle) - (cell - 1) / 2
    ring = neighbours(DEGREE)
    tokens = torch.arange(-ring, ring + 1).to(angle) * cell
    made = torch.exp(1j * angle[:, None] * tokens) @ spline_weights(1, cell, DEGREE, ring, 0, angle.device).to(torch.complex128)
    return (made * torch.exp(-1j * angle[:, None] * points)).real.mean(1), made.abs().square().mean(1)


def like(part: Any, values: Tensor) -> Any:
    """On the device of some values and in their precision."""
    if isinstance(part, tuple):
        return tuple(like(p, values) for p in part)
    return part.to(values.device, torch.complex(values[:1], values[:1]).dtype if part.is_complex() else values.dtype)


def _outer(factors: Sequence[Tensor]) -> Tensor:
    """The product of one factor per axis, with shape ``[*axes]``."""
    result = torch.ones((), dtype=torch.float64)
    for factor in factors:
        result = result[..., None] * factor
    return result
