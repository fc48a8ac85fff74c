"""The three-dimensional solver against exact solutions and balances."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpatch.data.spectral import SpectralGrid, advance, step
from ddpatch.data.turbulence import IsotropicTurbulence, resolved_viscosity
from ddpatch.errors import UserError
from ddpatch.random import Stream, generator


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small grids: several threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def coordinates(points: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, y, z on the grid; x varies along the last axis."""
    line = torch.arange(points, dtype=torch.float64) * (2 * math.pi / points)
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    return x, y, z


def random_flow(points: int = 16, viscosity: float = 0.05, power: float = 0.1) -> tuple[IsotropicTurbulence, Tensor]:
    flow = IsotropicTurbulence(SpectralGrid(points, 3), viscosity, power)
    return flow, flow.initial(generator(1, Stream.SIMULATION, 0))


def taylor_green(points: int, viscosity: float) -> tuple[IsotropicTurbulence, Tensor]:
    x, y, z = coordinates(points)
    velocity = torch.stack((x.sin() * y.cos() * z.cos(), -x.cos() * y.sin() * z.cos(), torch.zeros_like(x)))
    flow = IsotropicTurbulence(SpectralGrid(points, 3), viscosity, power=0.0)
    return flow, flow.grid.forward(velocity)


@pytest.mark.parametrize(("points", "ndim"), [(16, 2), (18, 2), (16, 3)])
def test_transform_keeps_resolved_modes_and_obeys_parseval(points: int, ndim: int) -> None:
    grid = SpectralGrid(points, ndim)
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((2, *grid.shape)))
    state = grid.forward(noise)
    fields = grid.inverse(state)
    full = np.fft.fftn(noise.numpy(), axes=range(1, ndim + 1))
    wavenumbers = np.meshgrid(*[np.fft.fftfreq(points, 1 / points)] * ndim, indexing="ij")
    full *= np.all([np.abs(k) < points / 3 for k in wavenumbers], axis=0)
    np.testing.assert_allclose(fields.numpy(), np.fft.ifftn(full, axes=range(1, ndim + 1)).real, atol=1e-13)
    torch.testing.assert_close(grid.mean_product(state, state), fields.square().mean((-1, -2)).sum() / points ** (ndim - 2))
    torch.testing.assert_close(grid.forward(fields), state)


def test_tendency_is_the_rotational_form_of_navier_stokes() -> None:
    flow, state = random_flow(24, power=0.0)
    slope, velocity = flow.tendency(state)
    rotational = flow.grid.forward(torch.linalg.cross(velocity, flow.vorticity(state), dim=0))
    torch.testing.assert_close(slope, flow.project(rotational), atol=1e-14, rtol=1e-12)


def test_components_lie_along_x_y_z_and_the_curl_is_right() -> None:
    x, y, z = coordinates(16)
    flow = IsotropicTurbulence(SpectralGrid(16, 3), 0.1)
    state = flow.grid.forward(torch.stack((torch.sin(2 * y), torch.sin(3 * z), torch.sin(x))))
    curl = torch.stack((-3 * torch.cos(3 * z), -torch.cos(x), -2 * torch.cos(2 * y)))
    torch.testing.assert_close(flow.vorticity(state), curl, atol=1e-13, rtol=0)


def test_initial_field_is_solenoidal_with_paos_spectrum() -> None:
    flow, _ = random_flow(32, resolved_viscosity(32))
    states = [flow.initial(generator(seed, Stream.SIMULATION, 0)) for seed in range(8)]
    divergence = flow.grid.inverse((flow.grid.gradient * states[0]).sum(0))
    assert divergence.abs().max() < 1e-13 * flow.vorticity(states[0]).abs().max()
    assert all(state[:, 0, 0, 0].abs().max() == 0 for state in states)
    shell = flow.grid.square.sqrt().round() == 6
    energy = np.mean([flow.energy(state * shell) for state in states])
    eta = (flow.viscosity**3 / 0.1) ** 0.25
    assert energy == pytest.approx(1.5 * 0.1 ** (2 / 3) * 6 ** (-5 / 3) * math.exp(-2.25 * (6 * eta) ** (4 / 3)), rel=0.1)


def test_energy_grows_by_power_less_dissipation() -> None:
    flow, state = random_flow()
    state = advance(flow, state, 0.5)
    slope, _ = flow.tendency(state)
    dt = 1e-4
    after = step(flow, state, slope, dt)
    balance = flow.power - 0.5 * (flow.dissipation(state) + flow.dissipation(after))
    assert (flow.energy(after) - flow.energy(state)) / dt == pytest.approx(balance, rel=1e-6)
    assert flow.dissipation(state) == pytest.approx(flow.viscosity * flow.vorticity(state).square().sum(0).mean().item())


def test_transport_conserves_energy_and_helicity_and_keeps_the_mean_at_rest() -> None:
    flow, state = random_flow(power=0.0)
    slope, _ = flow.tendency(state)
    curl = torch.linalg.cross(flow.grid.gradient, state, dim=0)
    scale = flow.grid.mean_product(slope, slope).sqrt()
    assert abs(flow.grid.mean_product(slope, state)) < 1e-14 * scale
    assert abs(flow.grid.mean_product(slope, curl)) < 1e-13 * scale
    assert slope[:, 0, 0, 0].abs().max() == 0


def test_beltrami_flow_decays_exactly() -> None:
    x, y, z = coordinates(16)
    a, b, c, k = 1.0, 0.7, 0.4, 2
    velocity = torch.stack(
        (
            a * torch.sin(k * z) + c * torch.cos(k * y),
            b * torch.sin(k * x) + a * torch.cos(k * z),
            c * torch.sin(k * y) + b * torch.cos(k * x),
        )
    )
    flow = IsotropicTurbulence(SpectralGrid(16, 3), 0.05, power=0.0)
    after = flow.velocity(advance(flow, flow.grid.forward(velocity), 1.0))
    torch.testing.assert_close(after, velocity * math.exp(-0.05 * k**2), atol=1e-13, rtol=0)


def test_taylor_green_vortex_follows_its_series_in_time() -> None:
    """Without viscosity the enstrophy is 3/8 (1 + 5/48 t² + O(t⁴)) (Taylor and Green, Proc. R. Soc. A 158, 1937)."""
    flow, state = taylor_green(32, 1e-12)
    assert flow.energy(state) == pytest.approx(1 / 8)
    after = {t: 0.5 * flow.vorticity(advance(flow, state, t)).square().sum(0).mean().item() / (3 / 8) for t in (0.0, 0.1, 0.2)}
    assert after[0.0] == pytest.approx(1)
    growth = [(after[t] - 1) / t**2 for t in (0.1, 0.2)]
    assert (4 * growth[0] - growth[1]) / 3 == pytest.approx(5 / 48, rel=1e-5)


def test_step_is_of_fourth_order() -> None:
    flow, state = taylor_green(16, 0.02)
    reference = advance(flow, state, 0.8, courant=0.2)
    errors = []
    for steps in (2, 4, 8):
        after = state
        for _ in range(steps):
            after = step(flow, after, flow.tendency(after)[0], 0.8 / steps)
        errors.append((after - reference).abs().max().item())
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert np.all(np.abs(orders - 4) < 0.35), orders


def test_forced_flow_becomes_steady_with_dissipation_equal_to_power() -> None:
    flow = IsotropicTurbulence(SpectralGrid(32, 3), resolved_viscosity(32))
    state = advance(flow, flow.initial(generator(0, Stream.SIMULATION, 0)), 6.0)
    dissipation, reynolds = [], []
    for _ in range(20):
        state = flow.refresh(advance(flow, state, 0.7))
        numbers = flow.statistics(state)
        dissipation.append(numbers["dissipation"])
        reynolds.append(numbers["reynolds_lambda"])
    assert np.mean(dissipation) == pytest.approx(0.1, rel=0.15)
    assert 15 < np.mean(reynolds) < 30
    gradient = flow.grid.inverse(flow.grid.gradient[0] * state[0])
    skewness = (gradient**3).mean() / (gradient**2).mean() ** 1.5
    assert -0.7 < skewness < -0.3


def test_refresh_removes_what_no_real_flow_has() -> None:
    flow, state = random_flow()
    spoilt = state.clone()
    spoilt[:, 1, 2, 0] += 0.1j
    spoilt[0, 0, 0, 3] += 0.1
    clean = flow.refresh(spoilt)
    divergence = (flow.grid.gradient * clean).sum(0).abs().max()
    assert divergence < 1e-14
    torch.testing.assert_close(clean[:, -1, -2, 0], clean[:, 1, 2, 0].conj(), atol=1e-16, rtol=0)


def test_infinite_velocity_is_reported() -> None:
    flow, state = random_flow()
    with pytest.raises(UserError, match="infinite"):
        advance(flow, state * math.nan, 1.0)
