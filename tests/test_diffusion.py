from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ddpatch.diffusion.average import AveragedModel
from ddpatch.diffusion.denoiser import Denoiser
from ddpatch.diffusion.level_scale import LevelScale
from ddpatch.diffusion.schedule import Schedule, sigma_range
from ddpatch.diffusion.solvers import SOLVERS, make_solver
from ddpatch.diffusion.weighting import RelativeError
from ddpatch.errors import UserError

MEAN, DEVIATION = 0.7, 0.5


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact denoiser of data N(MEAN, DEVIATION²)."""
    s2 = sigma.view(-1, 1).square()
    return (DEVIATION**2 * x + s2 * MEAN) / (DEVIATION**2 + s2)


def flow(x: Tensor, sigma: float, target: float) -> Tensor:
    """The exact solution of the probability-flow ODE for that data."""
    return MEAN + (x - MEAN) * math.sqrt((DEVIATION**2 + target**2) / (DEVIATION**2 + sigma**2))


def error(name: str, steps: int) -> float:
    sigmas = torch.logspace(math.log10(2), math.log10(0.05), steps + 1, dtype=torch.float64)
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    *_, end = make_solver(name, gaussian).trajectory(x, sigmas)
    return float((end - flow(x, 2.0, 0.05)).abs().max())


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_are_of_second_order(name: str) -> None:
    errors = [error(name, steps) for steps in (20, 40, 80, 160)]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders[-1] == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_reach_the_data_from_noise(name: str) -> None:
    schedule = Schedule(0.01, 50.0)
    noise = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    samples = make_solver(name, gaussian).solve(noise, schedule.steps(40))
    assert float(samples.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(samples.std()) == pytest.approx(DEVIATION, rel=0.03)


@pytest.mark.parametrize(("name", "evaluations"), [("heun", 19), ("dpm++2m", 10)])
def test_solvers_evaluate_as_often_as_they_say(name: str, evaluations: int) -> None:
    solver = make_solver(name, gaussian)
    solver.solve(torch.zeros(1, 1, dtype=torch.float64), Schedule(0.01, 10.0).steps(10))
    assert solver.evaluations == evaluations


def test_a_solver_starts_anew_every_time() -> None:
    solver, sigmas = make_solver("dpm++2m", gaussian), Schedule(0.01, 10.0).steps(8)
    noise = torch.ones(1, 1, dtype=torch.float64)
    assert torch.equal(solver.solve(noise, sigmas), solver.solve(noise, sigmas))


def test_an_unknown_solver_is_refused() -> None:
    with pytest.raises(UserError, match="expected one of heun"):
        make_solver("heunn", gaussian)


@pytest.mark.parametrize("sigma", [0.01, 1.0, 100.0])
def test_the_network_sees_and_learns_unit_variance(sigma: float) -> None:
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 1, 100_000, dtype=torch.float64)
    seen: list[Tensor] = []

    def network(x: Tensor, c_noise: Tensor) -> Tensor:
        seen.append(x)
        assert float(c_noise) == pytest.approx(math.log(sigma) / 4)
        return torch.zeros_like(x)

    level = torch.tensor([sigma], dtype=torch.float64)
    loss = Denoiser(network).loss(clean, noise, level)
    assert float(seen[0].var()) == pytest.approx(1, rel=0.02)
    assert float(loss) / clean.numel() == pytest.approx(1, rel=0.02)


def test_the_loss_is_the_squared_error_of_the_network() -> None:
    clean, noise, output = torch.randn(3, 2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = torch.tensor([0.3, 7.0], dtype=torch.float64)
    s = sigma[:, None, None]
    target = (clean - (clean + s * noise) / (s**2 + 1)) * (s**2 + 1).sqrt() / s
    loss = Denoiser(lambda x, c: output).loss(clean, noise, sigma)
    torch.testing.assert_close(loss, (output - target).square().sum())


def test_relative_errors_are_those_of_the_exact_linear_denoiser() -> None:
    """Independent modes with deviations 3 and 0.5, as many of each: the Wiener denoiser has loss 1 at every level."""
    deviation = torch.tensor([3.0, 0.5]).repeat(200_000)
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 3, len(deviation), generator=generator, dtype=torch.float64) * torch.stack(
        [deviation, torch.ones_like(deviation)]
    ).double().unsqueeze(1)
    sigma = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    weight = RelativeError((3.0, 0.5), (1.0, 1.0))(sigma)
    power, square = deviation.double().square(), sigma.square()[:, None]
    wiener = (clean + sigma[:, None] * noise) * power / (power + square)
    loss = weight * (wiener - clean).square().mean(1)
    torch.testing.assert_close(loss, torch.ones_like(loss), rtol=0.02, atol=0)


def test_training_levels_fill_the_range_evenly() -> None:
    schedule = Schedule(0.02, 200.0)
    levels = torch.cat([schedule.training(u / 10, 4) for u in range(10)]).log().sort().values
    gaps = levels.diff()
    assert float(levels[0]) == pytest.approx(math.log(0.02))
    torch.testing.assert_close(gaps, gaps.mean().expand_as(gaps))


def test_every_shell_has_as_much_of_the_training_levels() -> None:
    """Shells at 0.1 and 50, and one out of the range: beside the even tenth, a half of the levels is around each."""
    schedule = Schedule(0.001, 5000.0, deviation=(50.0, 0.1, 1e-5))
    levels = torch.cat([schedule.training(u / 100, 4) for u in range(100)]).log()
    span, middle = math.log(5000.0 / 0.001), math.log(0.1 * 50.0) / 2
    assert float(levels.min()) == pytest.approx(math.log(0.001)) and float(levels.max()) < math.log(5000.0)
    low = 0.45 + 0.1 * (middle - math.log(0.001)) / span
    assert float((levels < middle).double().mean()) == pytest.approx(low, abs=0.01)
    for shell in (0.1, 50.0):
        near = (levels - math.log(shell)).abs() < math.log(3)  # W (1 - W) holds tanh(ln 3) = 0.8 there
        assert float(near.double().mean()) == pytest.approx(0.45 * 0.8 + 0.1 * 2 * math.log(3) / span, abs=0.01)


def test_the_level_that_is_told_follows_values_along_the_logarithm() -> None:
    scale = LevelScale((1.2, 1.0, 0.9), (0.01, 0.1, 1.0))
    for sigma, value in ((0.001, 1.2), (0.01, 1.2), (math.sqrt(0.001), 1.1), (0.1, 1.0), (1.0, 0.9), (50.0, 0.9)):
        assert scale.told(sigma) == pytest.approx(sigma / (1 + (value - 1) / math.sqrt(1 + sigma**2)))
    assert scale.mean == pytest.approx(3.1 / 3)
    assert LevelScale().told(0.3) == 0.3


def test_sampling_levels_descend_from_the_range_to_zero() -> None:
    steps = Schedule(0.02, 200.0).steps(18)
    assert len(steps) == 19
    assert float(steps[0]) == pytest.approx(200)
    assert float(steps[-2]) == pytest.approx(0.02)
    assert float(steps[-1]) == 0
    assert bool((steps.diff() < 0).all())


def test_the_range_of_noise_levels_follows_the_spectrum() -> None:
    deviation = torch.tensor([0.0, 40.0, 10.0, 1.0, 0.1, 1e-9, 0.0])
    low, high = sigma_range(deviation, last_shell=5)
    assert (low, high) == pytest.approx((0.015, 320.0))
    assert sigma_range(deviation, last_shell=3)[0] == pytest.approx(0.15)


@pytest.mark.parametrize(("shells", "bound"), [(10, 0.03), (341, 0.08)])
def test_samples_of_the_linear_denoiser_have_the_energy_of_every_shell(shells: int, bound: float) -> None:
    """The spectrum of turbulence, k^-5/3 in three dimensions, on 32³ and on 1024³ points, in 20 steps."""
    deviation = torch.arange(1, shells + 1, dtype=torch.float64)[None] ** (-11 / 6)
    schedule = Schedule(*sigma_range(torch.cat([torch.zeros(1), deviation[0]]), shells))

    def linear(x: Tensor, sigma: Tensor) -> Tensor:
        return x * deviation**2 / (deviation**2 + sigma[:, None] ** 2)

    sample = make_solver("dpm++2m", linear).solve(torch.ones_like(deviation), schedule.steps(20))
    assert float((2 * (sample / deviation).log()).abs().max()) < bound


def test_the_average_forgets_the_initial_weights() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    average = AveragedModel(module, half_life=100.0)
    with torch.no_grad():
        module.weight.fill_(5.0)
    for step in range(1, 101):
        average.update(module, 10, 10 * step)
    assert float(average.module.weight) == pytest.approx(5.0, rel=1e-2)
    with torch.no_grad():
        module.weight.fill_(6.0)
    average.update(module, 100, 1100)
    assert float(average.module.weight) == pytest.approx(5.5, rel=1e-2)
