"""The linear part of the network: the exact denoiser of a Gaussian field of the data's covariance, as far as two levels reach.

The denoiser is D = c_skip x + c_out F with F = L u + g N, where u = c_in x is the scaled field, N the network, and L the linear
map that makes D the Wiener filter. In every direction in which the data have variance λ,

    L = σ (λ - 1) / (λ + σ²),

which is zero for white data, where c_skip x is the Wiener filter already. L has two levels, like the network:

* on the window of halo δ, the stencil K = V diag(σ (λ_i - 1) / (λ_i + σ²)) V^T, the row of the point in the middle, with the
  data's covariance V diag(λ_i) V^T on (2 δ + 1)^d points: the best linear prediction from this window;
* on the block means z of all patches, a correction in Fourier space. With the transfer function K(k) of the stencil, that of the
  block mean B(k) and that of the B-splines that bring tokens to points S(k), R(k) the mean square of what they make of a wave,

      v(k) = (S / R) [σ (P - 1) - K (P + σ²)] B (B² P + σ²)^-1 z(k)

  are the spline coefficients of the best linear prediction of what the stencil leaves, for a field of spectrum P(k).

N learns what is not Gaussian. Its factor g(σ) is the root mean square of what the linear part leaves, relative to c_out, so that
targets have unit variance: the same preconditioning as EDM's, from which it follows for white data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpatch.model.tokens import interpolation


class Waves(NamedTuple):
    """What the coarse level knows of the modes of one token grid, those of ``torch.fft.rfftn``.

    Attributes:
        values, vectors: P = U diag(p) U^H, with shapes ``[*modes, channel]`` and ``[*modes, channel, channel]``.
        phases: exp(i θ r) for the displacements r of the stencil, per axis: ``[2 δ + 1, mode]``.
        mean: B of block means, ``[*modes]``; 0 for waves that the tokens do not resolve.
        spline, square: S and R of splines, ``[*modes]``.
        weight: Modes of the whole spectrum that a mode stands for, per point of the grid, ``[*modes]``.
    """

    values: Tensor
    vectors: Tensor
    phases: tuple[Tensor, ...]
    mean: Tensor
    spline: Tensor
    square: Tensor
    weight: Tensor


class LinearPart(nn.Module):
    """L and g, from the moments of the data.

    Arguments:
        reach: δ of the stencil per axis.
        lags: C_ab(r), with shape ``[channel, channel, *(2 L + 1)]`` and L at least 2 δ
            (:class:`ddpatch.statistics.covariance.Moments`).
        power: P_ab(k), with shape ``[channel, channel, *(2 K + 1), K + 1, 2]``; ``None`` where there is no coarse part.
        grid: Points of the grid whose wave numbers these are.
    """

    values: Tensor
    vectors: Tensor

    def __init__(self, reach: Sequence[int], lags: Tensor, power: Tensor | None, grid: Sequence[int]) -> None:
        super().__init__()
        self.reach, self.grid, self.power = tuple(reach), tuple(grid), power
        self.channels, self.shape = len(lags), tuple(2 * n + 1 for n in reach)
        values, vectors = torch.linalg.eigh(stencil_covariance(lags, self.shape))
        self.register_buffer("values", values.clamp(min=0), persistent=False)
        self.register_buffer("vectors", vectors, persistent=False)
        self._waves: dict[tuple[object, ...], Waves] = {}

    def fine(self, windows: Tensor, sigma: Tensor, margin: int) -> Tensor:
        """The fine part of L u.

        Arguments:
            windows: u, with shape ``[sample, patch, channel, *(patch_shape + 2 margin)]``.
            sigma: Shape ``[sample]``.
            margin: Halo of the windows, at least δ.

        Returns:
            Shape ``[sample, patch, channel, *patch_shape]``.
        """
        for axis, n in enumerate(self.reach, start=3):
            windows = windows.narrow(axis, margin - n, windows.shape[axis] - 2 * (margin - n))
        convolve = F.conv2d if len(self.shape) == 2 else F.conv3d
        return torch.stack([convolve(u, kernel) for u, kernel in zip(windows, self.kernels(sigma), strict=True)])

    def kernels(self, sigma: Tensor) -> Tensor:
        """K(σ), with shape ``[sample, channel, channel, *(2 δ + 1)]``, as the weights of a convolution."""
        gain = sigma[:, None] * (self.values - 1) / (self.values + sigma.square()[:, None])
        return ((self._middle() * gain[:, None]) @ self.vectors.T).unflatten(-1, (self.channels, *self.shape))

    def coarse(self, means: Tensor, sigma: Tensor, cell: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The coarse part of L u, as spline coefficients on the tokens of a periodic grid.

        Arguments:
            means: Block means of u, with shape ``[sample, *token_grid, channel]``.
            sigma: Shape ``[sample]``.
            cell: Points of a token's cell per axis.

        Returns:
            Coefficients, with the shape of ``means``, and the variance that they take away, for :meth:`scale`.
        """
        grid = means.shape[1:-1]
        dims = tuple(range(1, 1 + len(grid)))
        waves, (levels, which) = self.waves(grid, cell), sigma.unique(return_inverse=True)
        gains, explained = zip(*(self._gain(level, waves) for level in levels), strict=True)
        found = torch.einsum("s...ab,s...b->s...a", torch.stack(gains)[which], torch.fft.rfftn(means, dim=dims))
        return torch.fft.irfftn(found, s=grid, dim=dims), torch.stack(explained)[which]

    def scale(self, sigma: Tensor, explained: Tensor | float = 0.0) -> Tensor:
        """g(σ), with shape ``[sample]``. ``explained`` is what :meth:`coarse` returns."""
        square = sigma.square()[:, None]
        left = (self._middle().square().mean(0) * self.values * (1 + square) / (self.values + square)).sum(1)
        return (left - explained).clamp(min=1e-6).sqrt()

    def waves(self, token_grid: Sequence[int], cell: Sequence[int]) -> Waves:
        """The modes of a token grid; P is interpolated where the grid is another than the data's."""
        key = (*token_grid, *cell, self.values.device, self.values.dtype)
        if key not in self._waves:
            self._waves[key] = Waves(*(_like(part, self.values) for part in self._make_waves(token_grid, cell)))
        return self._waves[key]

    def _make_waves(self, token_grid: Sequence[int], cell: Sequence[int]) -> Waves:
        assert self.power is not None
        numbers = [torch.fft.fftfreq(n, 1 / n, dtype=torch.float64) for n in token_grid[:-1]]
        numbers.append(torch.arange(token_grid[-1] // 2 + 1, dtype=torch.float64))
        angles = [2 * math.pi * k / (n * m) for k, n, m in zip(numbers, token_grid, cell, strict=True)]
        power = torch.view_as_complex(self.power)
        for axis, (angle, points) in enumerate(zip(angles, self.grid, strict=True), start=2):
            first = power.shape[axis] // 2 if axis < power.ndim - 1 else 0
            power = _interpolate(power, axis, angle * points / (2 * math.pi) + first)
        values, vectors = torch.linalg.eigh(power.movedim((0, 1), (-2, -1)))
        displacements = [torch.arange(-n, n + 1, dtype=torch.float64)[:, None] for n in self.reach]
        phases = tuple(torch.exp(1j * r * angle) for r, angle in zip(displacements, angles, strict=True))
        resolved = _outer([(2 * k.abs() < n).double() for k, n in zip(numbers, token_grid, strict=True)])
        mean = _outer([_block_mean(angle, m) for angle, m in zip(angles, cell, strict=True)]) * resolved
        spline, square = zip(*(_spline(angle, m) for angle, m in zip(angles, cell, strict=True)), strict=True)
        alone = _outer([*(torch.ones_like(k) for k in numbers[:-1]), (numbers[-1] == 0).double()])
        weight = (2 - alone) / math.prod(n * m for n, m in zip(token_grid, cell, strict=True))
        return Waves(values.clamp(min=0), vectors, phases, mean, _outer(spline), _outer(square), weight)

    def _gain(self, sigma: Tensor, waves: Waves) -> tuple[Tensor, Tensor]:
        """v(k) / z(k), with shape ``[*modes, channel, channel]``, and the variance that they take away, times 1 / c_out²."""
        square, p, turn = sigma.square(), waves.values, waves.vectors
        transfer = self.kernels(sigma[None])[0].to(turn.dtype)
        for phase in waves.phases:  # the axis in front is summed over, and its modes come last
            transfer = torch.tensordot(transfer, phase, dims=([2], [0]))
        transfer = turn.mH @ transfer.movedim((0, 1), (-2, -1)) @ turn
        residual = torch.diag_embed(sigma * (p - 1)) - transfer * (p + square)[..., None, :]
        inverse = 1 / (waves.mean.square()[..., None] * p + square)
        gain = (waves.spline / waves.square * waves.mean)[..., None, None] * (turn @ (residual * inverse[..., None, :]) @ turn.mH)
        explained = (residual.abs().square() * inverse[..., None, :]).sum((-2, -1)) / self.channels
        share = waves.weight * (waves.spline * waves.mean).square() / waves.square
        return gain, (share * explained).sum() / (1 + square)

    def _middle(self) -> Tensor:
        """The rows of V that belong to the point in the middle, with shape ``[channel, channel (2 δ + 1)^d]``."""
        points = math.prod(self.shape)
        return self.vectors[points // 2 :: points]


def stencil_covariance(lags: Tensor, shape: Sequence[int]) -> Tensor:
    """The covariance of the points of a stencil from that of displacements: C[(a, o), (b, o')] = C_ab(o' - o).

    Arguments:
        lags: Shape ``[channel, channel, *(2 L + 1)]``, L at least one less than the stencil on every axis.
        shape: Points of the stencil per axis.

    Returns:
        Shape ``[channel * points, channel * points]``, ordered as the weights of a convolution.
    """
    channels, points = len(lags), math.prod(shape)
    axes = [torch.arange(n) for n in shape]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)
    middle = torch.tensor([n // 2 for n in lags.shape[2:]])
    apart = places[None] - places[:, None] + middle
    index: Any = (slice(None), slice(None), *apart.unbind(-1))
    found = lags[index]
    return found.transpose(1, 2).reshape(channels * points, channels * points)


def _interpolate(values: Tensor, dim: int, places: Tensor) -> Tensor:
    """Linear interpolation along a dim, at places in units of its entries."""
    places = places.clamp(0, values.shape[dim] - 1)
    low = places.floor().clamp(max=max(values.shape[dim] - 2, 0)).long()
    share = (places - low).view([-1 if i == dim else 1 for i in range(values.ndim)])
    high = (low + 1).clamp(max=values.shape[dim] - 1)
    return values.index_select(dim, low) * (1 - share) + values.index_select(dim, high) * share


def _block_mean(angle: Tensor, cell: int) -> Tensor:
    """The mean over a cell of a wave with phase 0 in its middle: sin(m θ/2) / (m sin(θ/2))."""
    points = torch.arange(cell).to(angle) - (cell - 1) / 2
    return (angle[:, None] * points).cos().mean(1)


def _spline(angle: Tensor, cell: int) -> tuple[Tensor, Tensor]:
    """What splines make of a wave on the tokens: the amplitude of that wave at the points, and the mean square of all of it."""
    points = torch.arange(cell).to(angle) - (cell - 1) / 2
    tokens = torch.arange(-1, 2).to(angle) * cell
    made = torch.exp(1j * angle[:, None] * tokens) @ interpolation(1, cell).to(torch.complex128)
    return (made * torch.exp(-1j * angle[:, None] * points)).real.mean(1), made.abs().square().mean(1)


def _like(part: Any, values: Tensor) -> Any:
    """On the device of some values and in their precision."""
    if isinstance(part, tuple):
        return tuple(_like(p, values) for p in part)
    return part.to(values.device, torch.complex(values[:1], values[:1]).dtype if part.is_complex() else values.dtype)


def _outer(factors: Sequence[Tensor]) -> Tensor:
    """The product of one factor per axis, with shape ``[*axes]``."""
    result = torch.ones((), dtype=torch.float64)
    for factor in factors:
        result = result[..., None] * factor
    return result
