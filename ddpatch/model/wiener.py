"""The linear part of the network: the exact denoiser of a Gaussian field of the data's covariance, as far as two levels reach.

The denoiser is D = c_skip x + c_out F with F = L u + g N, where u = c_in x is the scaled field, N the network, and L the linear
map that makes D the Wiener filter. In every direction in which the data have variance λ,

    L = σ (λ - 1) / (λ + σ²),

which is zero for white data, where c_skip x is the Wiener filter already. L has two levels, like the network:

* on the window of halo δ, a stencil K of (2 δ + 1)^d points, the best for the waves that the coarse level does not see: it
  minimises the mean square error of waves of power P(k), each weighted with ω(k) = 1 - η(k), η the share that the tokens resolve.
  With the covariances of fields of spectrum ω P and ω on the stencil, C v = μ M v, V^T M V = 1,

      K = M V diag(σ (μ - 1) / (μ + σ²)) V^T,   the row of the point in the middle;

* on the means z that the tokens of all patches carry, a correction in Fourier space. With the transfer function K(k) of the
  stencil, that of the means B(k) and the noise A(k) in them, that of the B-splines that bring tokens to points S(k) and the mean
  square R(k) of what they make of a wave,

      v(k) = (S / R) [σ (P - 1) - K (P + σ²)] B (B² P + A σ²)^-1 z(k)

  are the spline coefficients of the best linear prediction of what the stencil leaves; η = S² B² / (R A).

N learns what is not Gaussian. Its factor g(σ) is the root mean square of what the linear part leaves, relative to c_out, so that
targets have unit variance: the preconditioning of EDM, which this is for white data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpatch.model.tokens import interpolation, weighting

TABLE = (-4.0, 4.0, 257)  # of g: first and last log10 σ, and their number
LARGEST_SHARE = 0.999  # of η: keeps the stencil's equations well posed


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


class LinearPart(nn.Module):
    """L and g, from the moments of the data.

    Arguments:
        reach: δ of the stencil and of the means per axis.
        lags: C_ab(r), with shape ``[channel, channel, *(2 L + 1)]`` and L at least 2 δ
            (:class:`ddpatch.statistics.covariance.Moments`).
        power: P_ab(k), with shape ``[channel, channel, *(2 K + 1), K + 1, 2]``.
        grid: Points of the grid whose wave numbers these are.
        cell: Points of a token's cell per axis, on a periodic grid; ``None`` where there is no coarse part.
    """

    left: Tensor
    values: Tensor
    vectors: Tensor
    factors: Tensor

    def __init__(
        self, reach: Sequence[int], lags: Tensor, power: Tensor, grid: Sequence[int], cell: Sequence[int] | None
    ) -> None:
        super().__init__()
        self.reach, self.grid, self.cell, self.power = tuple(reach), tuple(grid), cell, power
        self.channels, self.shape = len(lags), tuple(2 * n + 1 for n in reach)
        self._waves: dict[tuple[object, ...], Waves] = {}
        points = math.prod(self.shape)
        covariance, seen = stencil_covariance(lags.double(), self.shape), torch.zeros(2, *lags.shape, dtype=torch.float64)
        if cell is not None:
            seen = self._resolved([n // m for n, m in zip(grid, cell, strict=True)], lags)
        weights = torch.eye(len(covariance), dtype=torch.float64) - stencil_covariance(seen[1], self.shape)
        root = torch.linalg.cholesky(weights)
        whole = torch.linalg.solve_triangular(root, covariance - stencil_covariance(seen[0], self.shape), upper=False)
        values, turn = torch.linalg.eigh(torch.linalg.solve_triangular(root, whole.T, upper=False))
        self.register_buffer("values", values.clamp(min=0), persistent=False)
        self.register_buffer("vectors", torch.linalg.solve_triangular(root.T, turn, upper=True), persistent=False)
        self.register_buffer("left", (root @ turn)[points // 2 :: points], persistent=False)
        self.register_buffer("factors", self._factors(covariance), persistent=False)

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
        return ((self.left * gain[:, None]) @ self.vectors.T).unflatten(-1, (self.channels, *self.shape))

    def coarse(self, means: Tensor, sigma: Tensor) -> Tensor:
        """The coarse part of L u, as spline coefficients on the tokens of a periodic grid.

        Arguments:
            means: Means of u, with shape ``[sample, *token_grid, channel]``.
            sigma: Shape ``[sample]``.

        Returns:
            Shape of ``means``.
        """
        grid = means.shape[1:-1]
        dims = tuple(range(1, 1 + len(grid)))
        waves, (levels, which) = self.waves(grid), sigma.unique(return_inverse=True)
        gains = torch.stack([self._gain(level, waves)[0] for level in levels])
        found = torch.einsum("s...ab,s...b->s...a", gains[which], torch.fft.rfftn(means, dim=dims))
        return torch.fft.irfftn(found, s=grid, dim=dims)

    def scale(self, sigma: Tensor) -> Tensor:
        """g(σ), interpolated in a table, with shape ``[sample]``."""
        places = (sigma.log10() - TABLE[0]) / (TABLE[1] - TABLE[0]) * (TABLE[2] - 1)
        return _interpolate(self.factors, 0, places).exp()

    def waves(self, token_grid: Sequence[int]) -> Waves:
        """The modes of a token grid; P is interpolated where the grid is another than the data's."""
        key = (*token_grid, self.values.device, self.values.dtype)
        if key not in self._waves:
            self._waves[key] = Waves(*(_like(part, self.values) for part in self._make_waves(token_grid)))
        return self._waves[key]

    def _make_waves(self, token_grid: Sequence[int]) -> Waves:
        assert self.cell is not None
        kernels = [weighting(m, n) for m, n in zip(self.cell, self.reach, strict=True)]
        numbers = [torch.fft.fftfreq(n, 1 / n, dtype=torch.float64) for n in token_grid[:-1]]
        numbers.append(torch.arange(token_grid[-1] // 2 + 1, dtype=torch.float64))
        angles = [2 * math.pi * k / (n * m) for k, n, m in zip(numbers, token_grid, self.cell, strict=True)]
        power = torch.view_as_complex(self.power)
        for axis, (angle, points) in enumerate(zip(angles, self.grid, strict=True), start=2):
            first = power.shape[axis] // 2 if axis < power.ndim - 1 else 0
            power = _interpolate(power, axis, angle * points / (2 * math.pi) + first)
        values, vectors = torch.linalg.eigh(power.movedim((0, 1), (-2, -1)))
        phases = _phases(self.reach, angles)
        resolved = _outer([(2 * k.abs() < n).double() for k, n in zip(numbers, token_grid, strict=True)])
        mean = _outer([_transfer(h, angle) for h, angle in zip(kernels, angles, strict=True)]) * resolved
        noise = _outer([_noise(h, angle, m) for h, angle, m in zip(kernels, angles, self.cell, strict=True)])
        spline, square = zip(*(_spline(angle, m) for angle, m in zip(angles, self.cell, strict=True)), strict=True)
        alone = _outer([*(torch.ones_like(k) for k in numbers[:-1]), (numbers[-1] == 0).double()])
        weight = (2 - alone) / math.prod(n * m for n, m in zip(token_grid, self.cell, strict=True))
        return Waves(values.clamp(min=0), vectors, phases, mean, noise, _outer(spline), _outer(square), weight, tuple(angles))

    def _resolved(self, token_grid: Sequence[int], lags: Tensor) -> Tensor:
        """Covariances by displacement of fields of spectrum η P and η, with the shape of ``lags``, stacked."""
        waves = self._make_waves(token_grid)
        share = LARGEST_SHARE * (waves.spline * waves.mean).square() / (waves.square * waves.noise) * waves.weight
        power = (waves.vectors * waves.values[..., None, :]) @ waves.vectors.mH
        one = torch.eye(self.channels, dtype=power.dtype).expand_as(power)
        found = torch.stack([power.conj(), one]) * share[..., None, None]
        for phase in _phases([n // 2 for n in lags.shape[2:]], waves.angles):
            found = torch.tensordot(found, phase, dims=([1], [1]))
        return found.real

    def _factors(self, covariance: Tensor) -> Tensor:
        """ln g at the noise levels of the table: of the error of the stencil, less what the coarse part takes away."""
        points, table = math.prod(self.shape), torch.logspace(*TABLE, dtype=torch.float64)
        waves = None if self.cell is None else self.waves([n // m for n, m in zip(self.grid, self.cell, strict=True)])
        found = []
        for sigma in table:
            square, rows = sigma.square(), self.kernels(sigma[None])[0].flatten(1)
            rows = rows * sigma  # D = W y with W = (1 + σ K) / (1 + σ²)
            rows[torch.arange(self.channels), torch.arange(self.channels) * points + points // 2] += 1
            rows = rows / (1 + square)
            middle = covariance[points // 2 :: points]
            error = middle[:, points // 2 :: points].diagonal() - 2 * (rows * middle).sum(1) + ((rows @ covariance) * rows).sum(1)
            left = (error + square * rows.square().sum(1)).mean() * (1 + square) / square
            found.append(left if waves is None else left - self._gain(sigma, waves)[1])
        return torch.stack(found).clamp(min=1e-6).log() / 2

    def _gain(self, sigma: Tensor, waves: Waves) -> tuple[Tensor, Tensor]:
        """v(k) / z(k), with shape ``[*modes, channel, channel]``, and the variance that they take away, times 1 / c_out²."""
        square, p, turn = sigma.square(), waves.values, waves.vectors
        transfer = self.kernels(sigma[None])[0].to(turn.dtype)
        for phase in waves.phases:  # the axis in front is summed over, and its modes come last
            transfer = torch.tensordot(transfer, phase, dims=([2], [0]))
        transfer = turn.mH @ transfer.movedim((0, 1), (-2, -1)) @ turn
        residual = torch.diag_embed(sigma * (p - 1)) - transfer * (p + square)[..., None, :]
        inverse = 1 / (waves.mean.square()[..., None] * p + waves.noise[..., None] * square)
        gain = (waves.spline / waves.square * waves.mean)[..., None, None] * (turn @ (residual * inverse[..., None, :]) @ turn.mH)
        explained = (residual.abs().square() * inverse[..., None, :]).sum((-2, -1)) / self.channels
        share = waves.weight * (waves.spline * waves.mean).square() / waves.square
        return gain, (share * explained).sum() / (1 + square)


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


def _phases(most: Sequence[int], angles: Sequence[Tensor]) -> tuple[Tensor, ...]:
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
    lags = torch.arange(len(repeated)) - (len(kernel) - 1)
    kept = lags % cell == 0
    return cell * (angle[:, None] * lags[kept]).cos() @ repeated[kept]


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
