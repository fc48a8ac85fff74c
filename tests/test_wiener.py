"""The linear part of the network against the Wiener filter, direct sampling and the exact bounds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from problems import field_of, random_field, small_config, write_fields
from torch import Tensor

from ddpatch.config import Config
from ddpatch.data.fields import FieldFile
from ddpatch.data.gaussian import PowerLaw
from ddpatch.data.normalisation import Normalisation
from ddpatch.errors import UserError
from ddpatch.model.patches import cut, join
from ddpatch.parallel.collectives import Exchange
from ddpatch.parallel.comm import Communicator
from ddpatch.run import Field, decompose, make_denoiser, make_model
from ddpatch.statistics.covariance import measure_moments
from ddpatch.statistics.oracle import GaussianOracle, noise_level

GRID = (32, 32)
POWER = PowerLaw(2.0, 2.0).power(GRID)


def exact_field(power: Tensor, reach: int, tokens: int) -> Field:
    return field_of(power.double(), 1, (reach, reach), (tokens // 2, tokens // 2))


def small(**model: object) -> Config:
    return small_config(Path("none"), domain={"patch": [8, 8], "grid": GRID, "periodic": (True, True)}, model=model)


class Untrained:
    """The denoiser of a network whose last layer is still zero, on whole fields."""

    def __init__(self, config: Config, field: Field, comm: Communicator, grid: tuple[int, int] = GRID) -> None:
        self.grid = decompose(config, 1, grid)
        self.model = make_model(config, field)
        self.denoise = make_denoiser(config, field, self.model, Exchange(self.grid, comm, config.model.reach))

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        with torch.no_grad():
            return join(self.denoise(cut(x, self.grid), torch.full((len(x),), sigma, dtype=torch.float64)), self.grid)


def test_moments_are_those_of_the_samples(tmp_path: Path, comm: Communicator) -> None:
    path = write_fields(tmp_path / "data.h5")
    affine = Normalisation((0.1, -0.2), (1.5, 0.7))
    with FieldFile(path) as file:
        found = measure_moments(file, range(6), (16, 24), affine, (2, 3), (4, 5), comm)
        x = torch.stack([torch.from_numpy(file.read(i, (0, 0), (16, 24))) for i in range(6)]).double()
    x = affine.normalise(x[:, None])[:, 0]
    modes = torch.fft.fftn(x, dim=(2, 3), norm="ortho")
    for a in range(2):
        for b in range(2):
            for dy, dx in [(0, 0), (2, -3), (-1, 2)]:
                direct = (x[:, a] * x[:, b].roll((-dy, -dx), (1, 2))).mean()
                torch.testing.assert_close(found.lags[a, b, 2 + dy, 3 + dx], direct, rtol=1e-5, atol=1e-6)
            for ky, kx in [(0, 0), (-4, 5), (3, 1)]:
                direct = (modes[:, a, ky, kx] * modes[:, b, ky, kx].conj()).mean()
                torch.testing.assert_close(torch.view_as_complex(found.power[a, b, 4 + ky, kx]), direct, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.02, 0.5, 30.0])
def test_where_every_point_is_a_token_an_untrained_network_is_the_wiener_filter(sigma: float, comm: Communicator) -> None:
    oracle, denoise = GaussianOracle(POWER), Untrained(small(halo=2, tokens=8), exact_field(POWER, 2, 32), comm)
    x = random_field(2, 1, GRID)
    spectrum = torch.fft.fftn(x, dim=(2, 3))
    spectrum[:, :, 16], spectrum[:, :, :, 16] = 0, 0  # tokens do not resolve the Nyquist waves
    x = torch.fft.ifftn(spectrum, dim=(2, 3)).real
    torch.testing.assert_close(denoise(x, sigma), oracle.wiener(x, sigma), rtol=0, atol=1e-9 * float(x.std()))


def test_without_coarse_part_it_is_the_best_prediction_from_the_window(comm: Communicator) -> None:
    """The error that the factor g stands for, from a table, is that of the window around a point."""
    model = Untrained(small(coupling="halo", halo=2), exact_field(POWER, 2, 16), comm).model
    assert model.linear is not None
    oracle = GaussianOracle(POWER)
    for sigma in (0.05, 0.5, 5.0):
        found = model.linear.scale(torch.tensor([sigma], dtype=torch.float64)).square() * sigma**2 / (1 + sigma**2)
        assert float(found) == pytest.approx(oracle.patch((1, 1), sigma, halo=2), rel=1e-3)


@pytest.mark.parametrize("u", [0.1, 0.3, 0.5, 0.7, 0.8, 0.9])
def test_an_untrained_network_is_near_the_global_optimum(u: float, comm: Communicator) -> None:
    """And as far from it as the factor g says."""
    sigma, oracle = noise_level(u), GaussianOracle(POWER)
    denoise = Untrained(small(halo=2, tokens=4), exact_field(POWER, 2, 16), comm)
    fields = torch.stack([torch.fft.ifftn(POWER.sqrt() * torch.fft.fftn(w)).real for w in random_field(1, 256, GRID)[0]])[:, None]
    predicted = denoise(fields + sigma * random_field(256, 1, GRID, seed=1), sigma)
    error, gap = float((predicted - fields).square().mean()), oracle.patch((8, 8), sigma) - oracle.everything(sigma)
    assert oracle.everything(sigma) < error * 1.01 and error < oracle.everything(sigma) + 0.1 * gap
    level = torch.tensor([sigma], dtype=torch.float64)
    linear = denoise.model.linear
    assert linear is not None
    assert error == pytest.approx(float(linear.scale(level)) ** 2 * sigma**2 / (1 + sigma**2), rel=0.02)


def test_a_checkpoint_without_moments_is_named() -> None:
    state = exact_field(POWER, 2, 16).as_state()
    assert Field.from_state(state, Path("a.pt")).moments is not None
    del state["moments"]
    with pytest.raises(UserError, match=r"a\.pt: a checkpoint of an earlier version"):
        Field.from_state(state, Path("a.pt"))


def test_white_data_leave_nothing_to_the_linear_part(comm: Communicator) -> None:
    denoise = Untrained(small(halo=2), exact_field(torch.ones(GRID), 2, 16), comm)
    x = random_field(2, 1, GRID)
    torch.testing.assert_close(denoise(x, 0.7), x / 1.49, rtol=1e-9, atol=1e-9)


def test_on_a_larger_grid_the_spectrum_is_interpolated(comm: Communicator) -> None:
    """A field of the same density per wave number, on twice as many patches."""
    wide, oracle = (64, 64), GaussianOracle(PowerLaw(2.0, 2.0).power((64, 64), fundamental=0.5))
    x, denoise = random_field(2, 1, wide), Untrained(small(halo=2), exact_field(POWER, 2, 16), comm, wide)
    for sigma in (0.3, 3.0):
        expected = oracle.wiener(x, sigma)
        assert float((denoise(x, sigma) - expected).std() / expected.std()) < 0.15


def test_walls_and_lonely_patches_have_no_coarse_part_and_no_stencil_through_walls(comm: Communicator) -> None:
    field = exact_field(POWER, 0, 16)
    walls = small_config(Path("none"), domain={"patch": [8, 8], "grid": GRID, "periodic": (False, False)})
    for config in (walls, small(coupling="self-only"), small(coupling="none")):
        linear = make_model(config, field).linear
        assert linear is not None and linear.cell is None and linear.reach == (0, 0)
    assert make_model(small(wiener=False), field).linear is None
