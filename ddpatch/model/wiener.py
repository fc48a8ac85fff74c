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
from typing import Any

import torch
from torch import Tensor, nn

from ddpatch.model.convolution import convolve_few
from ddpatch.model.waves import Waves, interpolate, like, make_waves, phase_factors

TABLE = (-4.0, 4.0, 257)  # of g: first and last log10 σ, and their number
LARGEST_SHARE = 0.999  # of η: keeps the stencil's equations well posed


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
        return torch.stack([convolve_few(u, kernel) for u, kernel in zip(windows, self.kernels(sigma), strict=True)])

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
        levels, which = sigma, torch.arange(len(sigma), device=sigma.device)
        if len(sigma) > 1 and not torch.is_grad_enabled():  # the host waits for their number; those of a training differ
            levels, which = sigma.unique(return_inverse=True)
        waves = self.waves(grid)
        gains = torch.stack([self._gain(*level, waves)[0] for level in zip(levels, self.kernels(levels), strict=True)])
        found = torch.einsum("s...ab,s...b->s...a", gains[which], torch.fft.rfftn(means, dim=dims))
        return torch.fft.irfftn(found, s=grid, dim=dims)

    def scale(self, sigma: Tensor) -> Tensor:
        """g(σ), interpolated in a table, with shape ``[sample]``."""
        places = (sigma.log10() - TABLE[0]) / (TABLE[1] - TABLE[0]) * (TABLE[2] - 1)
        return interpolate(self.factors, 0, places).exp()

    def waves(self, token_grid: Sequence[int]) -> Waves:
        """The modes of a token grid; P is interpolated where the grid is another than the data's."""
        key = (*token_grid, self.values.device, self.values.dtype)
        if key not in self._waves:
            self._waves[key] = Waves(*(like(part, self.values) for part in self._make_waves(token_grid)))
        return self._waves[key]

    def _make_waves(self, token_grid: Sequence[int]) -> Waves:
        assert self.cell is not None
        return make_waves(token_grid, self.cell, self.reach, self.power, self.grid)

    def _resolved(self, token_grid: Sequence[int], lags: Tensor) -> Tensor:
        """Covariances by displacement of fields of spectrum η P and η, with the shape of ``lags``, stacked."""
        waves = self._make_waves(token_grid)
        share = LARGEST_SHARE * (waves.spline * waves.mean).square() / (waves.square * waves.noise) * waves.weight
        power = (waves.vectors * waves.values[..., None, :]) @ waves.vectors.mH
        one = torch.eye(self.channels, dtype=power.dtype).expand_as(power)
        found = torch.stack([power.conj(), one]) * share[..., None, None]
        for phase in phase_factors([n // 2 for n in lags.shape[2:]], waves.angles):
            found = torch.tensordot(found, phase, dims=([1], [1]))
        return found.real

    def _factors(self, covariance: Tensor) -> Tensor:
        """ln g at the noise levels of the table: of the error of the stencil, less what the coarse part takes away."""
        points, table = math.prod(self.shape), torch.logspace(*TABLE, dtype=torch.float64)
        square, kernels = table.square(), self.kernels(table)
        rows = kernels.flatten(2) * table[:, None, None]  # D = W y with W = (1 + σ K) / (1 + σ²)
        rows[:, torch.arange(self.channels), torch.arange(self.channels) * points + points // 2] += 1
        rows = rows / (1 + square)[:, None, None]
        middle = covariance[points // 2 :: points]
        error = middle[:, points // 2 :: points].diagonal() - 2 * (rows * middle).sum(2) + ((rows @ covariance) * rows).sum(2)
        left = (error + square[:, None] * rows.square().sum(2)).mean(1) * (1 + square) / square
        if self.cell is not None:
            waves = self.waves([n // m for n, m in zip(self.grid, self.cell, strict=True)])
            left = left - torch.stack([self._gain(*level, waves)[1] for level in zip(table, kernels, strict=True)])
        return left.clamp(min=1e-6).log() / 2

    def _gain(self, sigma: Tensor, kernel: Tensor, waves: Waves) -> tuple[Tensor, Tensor]:
        """v(k) / z(k), with shape ``[*modes, channel, channel]``, and the variance that they take away, times 1 / c_out²."""
        square, p, turn = sigma.square(), waves.values, waves.vectors
        transfer = kernel.to(turn.dtype)
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
