"""The two-dimensional solver against exact solutions and balances."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpatch.data.kolmogorov import KolmogorovFlow, resolved_viscosity
from ddpatch.data.spectral import SpectralGrid, advance, step
from ddpatch.random import Stream, generator


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small grids: several threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def coordinates(points: int) -> tuple[Tensor, Tensor]:
    """x, y on the grid; x varies along the last axis."""
    line = torch.arange(points, dtype=torch.float64) * (2 * math.pi / points)
    y, x = torch.meshgrid(line, line, indexing="ij")
    return x, y


def random_flow(points: int = 32, amplitude: float = 1.0, drag: float = 0.1) -> tuple[KolmogorovFlow, Tensor]:
    flow = KolmogorovFlow(SpectralGrid(points, 2), 0.01, drag, amplitude)
    return flow, flow.initial(generator(1, Stream.SIMULATION, 0))


def test_velocity_is_the_inverse_curl_of_the_vorticity() -> None:
    x, y = coordinates(32)
    velocity = torch.stack((torch.sin(3 * y) + torch.cos(x + y), torch.cos(2 * x) - torch.cos(x + y)))
    vorticity = -2 * torch.sin(2 * x) + 2 * torch.sin(x + y) - 3 * torch.cos(3 * y)
    flow = KolmogorovFlow(SpectralGrid(32, 2), 0.01)
    state = flow.grid.forward(vorticity)
    torch.testing.assert_close(flow.velocity(state), velocity, atol=1e-13, rtol=0)
    torch.testing.assert_close(flow.vorticity(state)[0], vorticity, atol=1e-13, rtol=0)
    assert flow.energy(state) == pytest.approx(0.5 * velocity.square().sum(0).mean().item())


def test_tendency_is_the_convective_form() -> None:
    flow, state = random_flow(amplitude=0.0)
    slope, velocity = flow.tendency(state)
    gradient = flow.grid.inverse(flow.grid.gradient * state)
    torch.testing.assert_close(slope, -flow.grid.forward((velocity * gradient).sum(0)), atol=1e-14, rtol=1e-12)


def test_force_is_sin_4y_along_x() -> None:
    _, y = coordinates(32)
    flow = KolmogorovFlow(SpectralGrid(32, 2), 0.01)
    torch.testing.assert_close(flow.grid.inverse(flow.forcing), -4 * torch.cos(4 * y), atol=1e-13, rtol=0)
    force = flow.velocity(flow.forcing)
    torch.testing.assert_close(force, torch.stack((torch.sin(4 * y), torch.zeros_like(y))), atol=1e-13, rtol=0)


def test_laminar_kolmogorov_flow_is_a_fixed_point() -> None:
    _, y = coordinates(32)
    flow = KolmogorovFlow(SpectralGrid(32, 2), 0.05, drag=0.1)
    laminar = flow.grid.forward(-4 * torch.cos(4 * y) / (0.05 * 16 + 0.1))
    slope, _ = flow.tendency(laminar)
    torch.testing.assert_close(slope, flow.damping * laminar, atol=1e-14, rtol=0)


def test_transport_conserves_energy_and_enstrophy() -> None:
    flow, state = random_flow(amplitude=0.0)
    slope, _ = flow.tendency(state)
    scale = flow.grid.mean_product(slope, slope).sqrt()
    assert abs(flow.grid.mean_product(slope, state)) < 1e-14 * scale
    assert abs(flow.grid.mean_product(slope, flow.inverse_square * state)) < 1e-14 * scale


def test_taylor_vortex_decays_exactly() -> None:
    x, y = coordinates(24)
    vorticity = 2 * torch.cos(3 * x) * torch.cos(3 * y) + torch.sin(3 * x + 3 * y)
    flow = KolmogorovFlow(SpectralGrid(24, 2), 0.02, drag=0.1, amplitude=0.0)
    after = flow.vorticity(advance(flow, flow.grid.forward(vorticity), 1.5))[0]
    torch.testing.assert_close(after, vorticity * math.exp(-1.5 * (0.02 * 18 + 0.1)), atol=1e-13, rtol=0)


def test_energy_budget() -> None:
    flow, state = random_flow()
    state = advance(flow, state, 2.0)
    slope, _ = flow.tendency(state)
    dt = 1e-4
    after = step(flow, state, slope, dt)
    losses = [2 * flow.drag * flow.energy(s) + flow.statistics(s)["dissipation"] - flow.power(s) for s in (state, after)]
    assert (flow.energy(after) - flow.energy(state)) / dt == pytest.approx(-sum(losses) / 2, rel=1e-6)


def test_step_is_of_fourth_order() -> None:
    flow, state = random_flow()
    state = advance(flow, state, 1.0)
    reference = advance(flow, state, 0.4, courant=0.05)
    errors = []
    for steps in (4, 8, 16):
        after = state
        for _ in range(steps):
            after = step(flow, after, flow.tendency(after)[0], 0.4 / steps)
        errors.append((after - reference).abs().max().item())
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert np.all(np.abs(orders - 4) < 0.35), orders


def test_default_viscosity_gives_resolved_turbulence_whose_input_and_losses_balance() -> None:
    flow = KolmogorovFlow(SpectralGrid(64, 2), resolved_viscosity(64))
    state = advance(flow, flow.initial(generator(0, Stream.SIMULATION, 0)), 20.0)
    power, losses, palinstrophy, first = [], [], [], state
    for _ in range(80):
        state = advance(flow, state, 0.5)
        power.append(flow.power(state))
        losses.append(2 * flow.drag * flow.energy(state) + flow.statistics(state)["dissipation"])
        palinstrophy.append(flow.grid.mean_product(state, flow.grid.square * state).item())
    assert np.mean(power) - (flow.energy(state) - flow.energy(first)) / 40 == pytest.approx(np.mean(losses), rel=0.03)
    assert np.std(power) > 0.05 * np.mean(power), "the flow is not turbulent"
    length = (flow.viscosity**3 / (flow.viscosity * np.mean(palinstrophy))) ** (1 / 6)
    assert 64 / 3 * length > 1.2
