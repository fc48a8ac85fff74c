"""Exact minimal denoising errors of a periodic Gaussian random field, by what the denoiser sees.

For Gaussian data the best denoiser is linear and its error is known without training or sampling. Let x have covariance C, let
y = x + σ n with white unit noise n, and let the denoiser of a patch P see the linear observations A y. Its mean squared error per
point is

    E(A) = tr(C_PP - K (A (C + σ² I) A^T)^-1 K^T) / |P|,   K = (C A^T)_P.

Observations here are points, of the patch or of a window with a halo, and block means over the cells of tokens. A trained model
whose error lies below E(own patch) has been told something by other patches: a proof that needs no statistics of training.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ddpatch.data.gaussian import draw
from ddpatch.decomposition import Decomposition
from ddpatch.errors import UserError
from ddpatch.model.patches import cut

Denoise = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Observations:
    """Means of a field over equal cells.

    Arguments:
        corners: First point of every cell, with shape ``[observation, axis]``.
        cell: Points of a cell along each axis; all 1 for single points.
    """

    corners: Tensor
    cell: tuple[int, ...]


class GaussianOracle:
    """Minimal denoising errors of one Gaussian random field; all in units of the field's variance per point.

    Arguments:
        power: Variance of every orthonormal Fourier mode, with shape ``[*grid]``.

    Raises:
        UserError: unless all variances are positive and finite.
    """

    def __init__(self, power: Tensor) -> None:
        if not bool((power > 0).all() and power.isfinite().all()):
            raise UserError(f"spectrum: expected positive numbers, got one of {float(power.min()):g}")
        self.power = power.to(torch.float64)

    def everything(self, sigma: float) -> float:
        """The error of the global optimum, the Wiener filter: the mean over modes of S σ² / (S + σ²)."""
        return float((self.power * sigma**2 / (self.power + sigma**2)).mean())

    def wiener(self, noisy: Tensor, sigma: float) -> Tensor:
        """What the global optimum predicts for noisy fields ``[..., *grid]``."""
        axes = tuple(range(-self.power.ndim, 0))
        return torch.fft.ifftn(torch.fft.fftn(noisy, dim=axes) * (self.power / (self.power + sigma**2)), dim=axes).real

    def patch(self, patch_shape: Sequence[int], sigma: float, halo: int = 0, tokens: int = 0) -> float:
        """The error of the best denoiser of a patch that sees the patch and some of the rest.

        Arguments:
            patch_shape: Points of a patch.
            sigma: Noise level.
            halo: Width of the layer of points around the patch that is seen too.
            tokens: q, of every patch the q^d means over equal cells are seen too; 0 for none.
        """
        own, seen = self.points(patch_shape, 0), [self.points(patch_shape, halo)]
        if tokens:
            seen.append(self.means(patch_shape, tokens, halo))
        matrix = torch.cat([torch.cat([self._covariance(a, b, sigma**2) for b in seen], dim=1) for a in seen])
        cross = torch.cat([self._covariance(a, own, 0.0) for a in seen])
        explained = torch.linalg.solve_triangular(torch.linalg.cholesky(matrix), cross, upper=False).square().sum()
        return float(self.power.mean() - explained / len(own.corners))

    def distances(
        self, denoise: Denoise, decomposition: Decomposition, sigma: float, randoms: Iterable[np.random.Generator]
    ) -> Tensor:
        """Mean squared distance <|D - W|²> of a denoiser from the global optimum, one for every drawn field, ``[field]``.

        The error of W is orthogonal to D - W, so that D has the error E_global + <|D - W|²>: this measures the excess alone,
        with far less Monte-Carlo error than a difference of errors.

        Arguments:
            denoise: D(x, σ) of all patches: ``[1, patch, 1, *patch_shape]`` and ``[1]``, single precision.
            decomposition: The grid and its patches.
            sigma: Noise level.
            randoms: For every field the generator of field and noise.
        """
        level, found = torch.tensor([sigma], dtype=torch.float64), []
        for random in randoms:
            noisy = draw(self.power, random)
            noisy += sigma * torch.from_numpy(random.standard_normal(tuple(noisy.shape)))
            best = cut(self.wiener(noisy, sigma)[None, None], decomposition)
            found.append((denoise(cut(noisy[None, None].float(), decomposition), level) - best).square().mean())
        return torch.stack(found)

    def points(self, patch_shape: Sequence[int], halo: int) -> Observations:
        """The points of the first patch's window."""
        return Observations(self._box([-halo] * len(patch_shape), [n + halo for n in patch_shape]), (1,) * len(patch_shape))

    def means(self, patch_shape: Sequence[int], tokens: int, halo: int) -> Observations:
        """The cells of all patches but those that lie in the first patch's window, whose means its points tell already."""
        if any(n % tokens for n in patch_shape):
            raise UserError(f"tokens: {tokens} per axis do not divide the patch {list(patch_shape)}")
        cell = tuple(n // tokens for n in patch_shape)
        window = {tuple(p) for p in self.points(patch_shape, halo).corners.tolist()}
        corners = [
            corner
            for corner in itertools.product(*(range(0, n, c) for n, c in zip(self.power.shape, cell, strict=True)))
            if not {tuple(p) for p in self._box(corner, [a + c for a, c in zip(corner, cell, strict=True)]).tolist()} <= window
        ]
        return Observations(torch.tensor(corners, dtype=torch.long).view(-1, len(cell)), cell)

    def _box(self, start: Sequence[int], stop: Sequence[int]) -> Tensor:
        """All points of a box, each once, wrapped into the grid, with shape ``[point, axis]``."""
        axes = [torch.arange(a, b).remainder(n).unique() for a, b, n in zip(start, stop, self.power.shape, strict=True)]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)

    def _covariance(self, rows: Observations, columns: Observations, noise: float) -> Tensor:
        """Covariance of two sets of observations of x + noise, with shape ``[row, column]``.

        It depends on the distance of the corners only: the inverse transform of (S + noise) w_rows w_columns^*.
        """
        shape = self.power.shape
        transfer = self._transfer(rows.cell) * self._transfer(columns.cell).conj()
        table = torch.fft.ifftn((self.power + noise) * transfer).real.flatten()
        place = torch.zeros(len(rows.corners), len(columns.corners), dtype=torch.long)
        for axis, n in enumerate(shape):
            place *= n
            place += (rows.corners[:, None, axis] - columns.corners[None, :, axis]).remainder(n)
        return table[place]

    def _transfer(self, cell: Sequence[int]) -> Tensor:
        """Fourier factors of the mean over the cell that begins at a point, with shape ``[*grid]``."""
        box = torch.zeros(self.power.shape, dtype=torch.float64)
        box[tuple(slice(0, c) for c in cell)] = 1 / math.prod(cell)
        return torch.fft.fftn(box).conj()


def noise_level(u: float) -> float:
    """σ of x_t = cos(uπ/2) x + sin(uπ/2) n as x_σ = x + σ n: tan(uπ/2)."""
    return math.tan(u * math.pi / 2)
