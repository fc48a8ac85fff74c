"""Spectra against Parseval's theorem, single modes, and fields whose divergence is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpatch.data.fields import FieldFile
from ddpatch.io.volume import VolumeHeader, write_volume
from ddpatch.parallel.comm import Communicator
from ddpatch.statistics.slabs import Crops
from ddpatch.statistics.spectrum import Spectrum, fundamental, hann, mode_deviation

GRIDS = pytest.mark.parametrize("grid", [(8, 8, 8), (7, 6, 5), (9, 8), (5, 7)], ids=str)


def write(path: Path, values: np.ndarray, spacing: float = 0.5, periodic: bool = True) -> Path:
    """A file of double precision fields ``[sample, channel, *grid]``."""
    ndim = values.ndim - 2
    names = tuple(f"c{i}" for i in range(values.shape[1]))
    header = VolumeHeader(len(values), names, values.shape[2:], (spacing,) * ndim, (periodic,) * ndim, "float64")
    write_volume(path, header, values)
    return path


def spectrum_of(file: FieldFile, comm: Communicator, unit: float | None = None) -> Spectrum:
    header = file.header
    return Spectrum(header.grid_shape, header.spacing, header.periodic, comm, unit)


def coordinates(grid: tuple[int, ...]) -> list[np.ndarray]:
    """The phase 2π x / L along every axis, first axis first."""
    return list(np.meshgrid(*[2 * np.pi * np.arange(n) / n for n in grid], indexing="ij"))


@GRIDS
def test_energy_sums_to_half_the_mean_square(tmp_path: Path, comm: Communicator, grid: tuple[int, ...]) -> None:
    u = np.random.default_rng(1).standard_normal((1, 2, *grid))
    with FieldFile(write(tmp_path / "u.h5", u)) as file:
        energy = spectrum_of(file, comm).energy(file, 0)
    assert float(energy.sum()) == pytest.approx(0.5 * (u[0] ** 2).sum(0).mean(), rel=1e-12)


@pytest.mark.parametrize(
    ("grid", "mode", "shell"),
    [((8, 8, 8), (1, 2, 2), 3), ((9, 9, 9), (0, 0, 2), 2), ((9, 9, 9), (2, 0, 1), 2), ((8, 8), (0, 4), 4), ((7, 7), (3, 2), 4)],
)
def test_a_single_mode_lands_in_its_shell(
    tmp_path: Path, comm: Communicator, grid: tuple[int, ...], mode: tuple[int, ...], shell: int
) -> None:
    phase = sum(k * x for k, x in zip(mode, coordinates(grid), strict=True))
    u = 3.0 * np.cos(phase)
    with FieldFile(write(tmp_path / "u.h5", u[None, None])) as file:
        energy = spectrum_of(file, comm).energy(file, 0)
    expected = torch.zeros_like(energy)
    expected[shell] = 0.5 * float((u**2).mean())
    torch.testing.assert_close(energy, expected, rtol=1e-12, atol=1e-12)


def test_shells_are_physical_on_an_oblong_box(tmp_path: Path, comm: Communicator) -> None:
    grid = (8, 16)
    y, x = coordinates(grid)
    u = np.stack([np.cos(y), np.cos(3 * x)])[None]
    with FieldFile(write(tmp_path / "u.h5", u)) as file:
        energy = spectrum_of(file, comm).energy(file, 0)
        coarse = spectrum_of(file, comm, unit=2 * fundamental(grid, (0.5, 0.5))).energy(file, 0)
    assert energy.numpy().round(12).tolist()[:5] == [0, 0, 0.25, 0.25, 0]  # one wave over half the length is k = 2
    assert coarse.numpy().round(12).tolist()[:3] == [0, 0.25, 0.25]


def test_a_window_keeps_the_energy_of_noise_and_a_trend_from_leaking(tmp_path: Path, comm: Communicator) -> None:
    assert float(hann(17).square().mean()) == pytest.approx(1)
    noise = np.random.default_rng(2).standard_normal((1, 1, 64, 64)) + 100.0
    ramp = np.broadcast_to(np.arange(64.0), (1, 1, 64, 64))
    with FieldFile(write(tmp_path / "noise.h5", noise, periodic=False)) as file:
        energy = float(spectrum_of(file, comm).energy(file, 0).sum())
    assert energy == pytest.approx(0.5 * noise.var(), rel=0.1)
    tails = []
    for periodic in (True, False):
        with FieldFile(write(tmp_path / f"ramp{periodic}.h5", ramp, periodic=periodic)) as file:
            energies = spectrum_of(file, comm).energy(file, 0)
            tails.append(float(energies[16:32].sum()))
    assert tails[1] < 1e-4 * tails[0]


@pytest.mark.parametrize("grid", [(8, 8, 8), (7, 9, 8), (9, 8)], ids=str)
def test_divergence_of_a_curl_is_zero_and_of_a_gradient_one(tmp_path: Path, comm: Communicator, grid: tuple[int, ...]) -> None:
    phases = coordinates(grid)[::-1]
    x, y = phases[0], phases[1]
    solenoidal = [np.cos(x) * np.sin(y), -np.sin(x) * np.cos(y)]
    steep = [np.cos(x) * np.sin(y), np.sin(x) * np.cos(y)]
    fields = np.zeros((2, len(grid), *grid))
    for sample, parts in enumerate((solenoidal, steep)):
        fields[sample, :2] = parts
    spacing = [2 * np.pi / n for n in grid]
    header = VolumeHeader(2, tuple("uvw"[: len(grid)]), grid, tuple(spacing), (True,) * len(grid), "float64")
    write_volume(tmp_path / "u.h5", header, fields)
    with FieldFile(tmp_path / "u.h5") as file:
        found = [spectrum_of(file, comm).energy_and_divergence(file, sample)[1] for sample in (0, 1)]
    ratios = [math.sqrt(max(0.0, float(a / b))) for a, b in found]
    assert ratios[0] < 1e-12 and ratios[1] == pytest.approx(1, abs=1e-12)


def test_mode_deviation_of_white_noise_is_its_standard_deviation(tmp_path: Path, comm: Communicator) -> None:
    noise = np.random.default_rng(3).standard_normal((3, 2, 16, 16, 16)) * 5.0 + 7.0
    with FieldFile(write(tmp_path / "u.h5", noise)) as file:
        deviation, modes = mode_deviation(file, range(3), comm, mean=noise.mean((0, 2, 3, 4)), std=np.full(2, 2.5))
        cropped, _ = mode_deviation(file, [0, 2], comm, grid=(16, 8, 16))
    assert float(modes.sum()) == 16**3
    assert 0 < float(deviation[0]) < 5
    assert deviation[2:].numpy() == pytest.approx(2.0, rel=0.1)
    assert cropped[2:9].numpy() == pytest.approx(5.0, rel=0.15)


def test_mode_deviation_against_numpy(tmp_path: Path, comm: Communicator) -> None:
    u = np.random.default_rng(4).standard_normal((2, 1, 6, 7))
    power = (np.abs(np.fft.fftn(u, axes=(2, 3), norm="ortho")) ** 2).mean((0, 1))
    k = np.hypot(np.fft.fftfreq(6, 1 / 6)[:, None] * 7 / 6, np.fft.fftfreq(7, 1 / 7)[None])
    shell = np.floor(k + 0.5).astype(int)
    expected = [math.sqrt(power[shell == s].mean()) for s in range(shell.max() + 1)]
    with FieldFile(write(tmp_path / "u.h5", u)) as file:
        deviation, modes = mode_deviation(file, range(2), comm)
        fluctuation, _ = mode_deviation(file, range(2), comm, mean=u.mean((0, 2, 3)))
    assert deviation.numpy() == pytest.approx(expected, rel=1e-12)
    assert modes.tolist() == np.bincount(shell.ravel()).tolist()
    assert float(fluctuation[0]) == pytest.approx(math.sqrt(42) * u.mean((1, 2, 3)).std(), rel=1e-10)


def test_crops_are_the_boxes_of_the_field(tmp_path: Path) -> None:
    u = np.random.default_rng(5).standard_normal((2, 1, 6, 8))
    with FieldFile(write(tmp_path / "u.h5", u)) as file:
        crops = Crops(file, (6, 3))
        assert crops.header.shape == (4, 1, 6, 3) and crops.header.periodic == (True, False)
        assert np.array_equal(crops.read(3, (0, 0), (6, 3)), u[1, :, :, 3:6])
        assert np.array_equal(crops.read(0, (-1, 1), (2, 2)), u[0][:, [-1, 0], 1:3])
