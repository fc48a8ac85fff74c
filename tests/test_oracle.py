"""Exact error bounds against dense algebra, and against denoising drawn fields."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpatch.data.gaussian import PowerLaw, draw
from ddpatch.errors import UserError
from ddpatch.statistics.oracle import GaussianOracle, noise_level

SIGHTS = [(0, 0), (1, 0), (2, 0), (0, 1), (0, 2), (1, 2), (2, 4)]  # halo, tokens


def dense_covariance(power: Tensor) -> Tensor:
    """C of all points from the definition: F^-1 diag(S) F."""
    n = power.numel()
    units = torch.eye(n, dtype=torch.float64).view(n, *power.shape)
    axes = tuple(range(1, power.ndim + 1))
    return torch.fft.ifftn(torch.fft.fftn(units, dim=axes) * power, dim=axes).real.flatten(1)


def observations(shape: tuple[int, ...], patch: tuple[int, ...], halo: int, tokens: int) -> Tensor:
    """Rows of A: points of the window, and the means over the cells of all *other* patches that are not within it."""
    rows = []
    for offset in itertools.product(*(range(-halo, n + halo) for n in patch)):
        row = torch.zeros(shape, dtype=torch.float64)
        row[tuple(o % n for o, n in zip(offset, shape, strict=True))] = 1
        rows.append(row)
    window = torch.stack(rows).sum(0).clamp(max=1)
    cell = [n // max(tokens, 1) for n in patch]
    for corner in itertools.product(*(range(0, n, c) for n, c in zip(shape, cell, strict=True))) if tokens else ():
        row = torch.zeros(shape, dtype=torch.float64)
        row[tuple(slice(a, a + c) for a, c in zip(corner, cell, strict=True))] = 1 / math.prod(cell)
        if float((row * (1 - window)).sum()) > 0:
            rows.append(row)
    return torch.stack(rows).flatten(1)


@pytest.mark.parametrize(("halo", "tokens"), SIGHTS)
@pytest.mark.parametrize(("shape", "patch"), [((12, 8), (4, 4)), ((8, 8, 8), (4, 4, 4))])
def test_bounds_equal_dense_algebra(shape: tuple[int, ...], patch: tuple[int, ...], halo: int, tokens: int) -> None:
    power, sigma = PowerLaw(1.5, 2.0).power(shape), 0.7
    covariance = dense_covariance(power)
    own = observations(shape, patch, 0, 0)
    seen = observations(shape, patch, halo, tokens).unique(dim=0)
    matrix = seen @ (covariance + sigma**2 * torch.eye(len(covariance), dtype=torch.float64)) @ seen.T
    cross = own @ covariance @ seen.T
    expected = (own @ covariance @ own.T).trace() - (cross @ torch.linalg.solve(matrix, cross.T)).trace()
    found = GaussianOracle(power).patch(patch, sigma, halo, tokens)
    assert found == pytest.approx(float(expected) / math.prod(patch), rel=1e-9)


@pytest.mark.parametrize("shape", [(16, 16), (8, 8, 8)])
def test_errors_of_drawn_fields(shape: tuple[int, ...]) -> None:
    """The best denoisers of a patch and of the field, applied to fields, make the errors that the oracle says."""
    power, sigma, samples = PowerLaw(2.0, 2.0).power(shape), 1.0, 400
    oracle, random = GaussianOracle(power), np.random.default_rng(0)
    fields = torch.stack([draw(power, random) for _ in range(samples)])
    noisy = fields + sigma * torch.from_numpy(random.standard_normal(fields.shape))
    patch = tuple(n // 2 for n in shape)
    own = observations(shape, patch, 0, 0)
    covariance = own @ dense_covariance(power) @ own.T
    gain = covariance @ torch.linalg.inv(covariance + sigma**2 * torch.eye(len(own), dtype=torch.float64))
    for error, bound in (
        (oracle.wiener(noisy, sigma) - fields, oracle.everything(sigma)),
        (noisy.flatten(1) @ own.T @ gain.T - fields.flatten(1) @ own.T, oracle.patch(patch, sigma)),
    ):
        each = error.flatten(1).square().mean(1)
        assert abs(float(each.mean()) - bound) < 4 * float(each.std()) / samples**0.5


def test_more_sight_is_never_worse() -> None:
    oracle = GaussianOracle(PowerLaw(2.0, 2.0).power((32, 32)))
    for sigma in (0.1, 1.0, 10.0):
        errors = [oracle.patch((8, 8), sigma, halo, tokens) for halo, tokens in ((0, 0), (0, 1), (0, 4), (2, 4), (4, 4))]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] > oracle.everything(sigma)


def test_a_window_over_the_whole_grid_is_the_global_optimum() -> None:
    oracle = GaussianOracle(PowerLaw(2.0, 1.5).power((12, 8)))
    assert oracle.patch((4, 4), 0.5, halo=4) == pytest.approx(oracle.everything(0.5), rel=1e-10)


def test_the_larger_piece_of_a_field_has_the_same_spectrum() -> None:
    law = PowerLaw(2.0, 2.0)
    small, large = law.power((16, 16)), law.power((32, 32), 0.5)
    ratio = large[::2, ::2][:8, :8] / small[:8, :8]
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))


def test_noise_levels() -> None:
    assert noise_level(0.5) == pytest.approx(1.0)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_spectrum_that_is_not_positive_is_refused(value: float) -> None:
    power = torch.ones(4, 4)
    power[1, 2] = value
    with pytest.raises(UserError, match="spectrum: expected positive"):
        GaussianOracle(power)
    with pytest.raises(UserError, match="exponent"):
        PowerLaw(2.0, value)


def test_tokens_that_do_not_divide_the_patch_are_refused() -> None:
    with pytest.raises(UserError, match="3 per axis do not divide"):
        GaussianOracle(PowerLaw().power((16, 16))).patch((8, 8), 1.0, tokens=3)
