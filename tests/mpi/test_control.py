"""The control variate of a calibration: its expectation is known, it follows samples, and knows nothing of ranks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import field_of, small_config, write_fields

from ddpatch.calibrate import SEED, calibrate, excess, shell_energies
from ddpatch.control import FEWEST, controlled_mean, covariance, gaussian_energies
from ddpatch.data.fields import FieldFile
from ddpatch.decomposition import Decomposition
from ddpatch.errors import UserError
from ddpatch.parallel.comm import Communicator
from ddpatch.random import Stream, patch_noise
from ddpatch.sample import Sampler, sample
from ddpatch.statistics.spectrum import Spectrum
from ddpatch.train import train

pytestmark = pytest.mark.mpi(min_size=1)


def test_a_correlated_variate_of_known_mean_takes_the_chance_out(comm: Communicator) -> None:
    """With correlation c the variance of 16 samples' mean falls to (1 - c²) of it, times 14 / 13 for β; the mean stays."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4000, 16, generator=generator, dtype=torch.float64)
    z, y = 1 + 0.1 * a, 3 + 0.2 * (0.9 * a + math.sqrt(1 - 0.81) * b)
    plain, found = y.mean(1), [controlled_mean(*pair) for pair in zip(y, z, strict=True)]
    values = torch.tensor([mean.value for mean in found])
    assert values.mean().item() == pytest.approx(3, abs=3 * 0.05 / math.sqrt(4000))
    assert (values.var() / plain.var()).item() == pytest.approx(0.19 * 14 / 13, rel=0.1)
    assert np.mean([mean.error**2 for mean in found]) == pytest.approx(values.var().item(), rel=0.15)
    few = controlled_mean(y[0, : FEWEST - 1], z[0, : FEWEST - 1])
    assert few.value == y[0, : FEWEST - 1].mean().item()


def test_energy_of_gaussian_fields_from_the_noise_of_samples(comm: Communicator) -> None:
    """Against the definition on whole fields, of a field whose covariance is known up to wave number 4, and its mean is 1."""
    points = torch.stack(torch.meshgrid(torch.arange(16.0), torch.arange(24.0), indexing="ij")).double()
    k = torch.minimum(points, torch.tensor([16.0, 24.0]).view(2, 1, 1) - points)
    field = field_of((1 + k.square().sum(0)) ** -2.0, 2, (2, 2), (4, 4))
    grid = Decomposition((16, 24), (8, 8), comm.size)
    found = gaussian_energies(field, grid, range(40), 3, 5, comm).mean(1)
    one = comm.split(comm.rank)
    power = covariance(field, Spectrum(grid.grid_shape, field.spacing, grid.periodic, one))
    spectrum = Spectrum(grid.grid_shape, field.spacing, grid.periodic, one)
    for sample_number in (0, 39):
        noise = torch.zeros(2, 16, 24, dtype=torch.float64)
        for patch in range(6):
            drawn = patch_noise((2, 8, 8), 3, Stream.SAMPLE, [sample_number], 0, [patch], torch.float64)
            noise[(slice(None), *grid.slices(patch))] = drawn[0, 0]
        values, turn = torch.linalg.eigh(power.movedim((0, 1), (-2, -1)))
        root = (turn * values.clamp(min=0).sqrt()[..., None, :]) @ turn.mH
        fields = (root @ torch.fft.rfft2(noise, norm="ortho").movedim(0, -1)[..., None])[..., 0]
        energy, expected = (spectrum.shell_sums(e)[1:6] for e in (fields.abs().square().sum(-1), values.sum(-1)))
        assert found[sample_number].item() == pytest.approx((energy / expected).mean().item(), rel=1e-10)
    assert found.mean().item() == pytest.approx(1, abs=3 * found.std().item() / math.sqrt(40))
    assert 0.02 < found.std().item() < 0.5


def test_it_takes_most_of_the_chance_out_of_the_energy_of_samples(comm: Communicator, shared_path: Path) -> None:
    """The network is the exact linear denoiser and a little noise, so that samples are what the noise says."""
    data = comm.on_root(lambda: write_fields(shared_path / "data.h5", samples=32))
    train(small_config(data, "float32", train={"steps": 1, "batch": 8}, model={"halo": 4}), shared_path / "run", comm)
    sample(Sampler(shared_path / "run", comm), shared_path / "samples.h5", 16, "dpm++2m", 10, seed=SEED)
    sampler = Sampler(shared_path / "run", comm)
    controlled = excess(shell_energies(shared_path / "samples.h5", sampler.field, comm), sampler).mean
    with FieldFile(shared_path / "samples.h5") as file:
        fields = np.stack([file.read(k, (0, 0), (16, 24)) for k in range(16)])
    modes = np.abs(np.fft.fft2(fields)) ** 2
    wave = np.hypot(np.fft.fftfreq(16, 1 / 24)[:, None], np.fft.fftfreq(24, 1 / 24))
    relative = np.mean([(s := modes[..., np.round(wave) == k].sum((1, 2))) / s.mean() for k in range(1, 6)], axis=0)
    assert controlled.error < 0.5 * relative.std(ddof=1) / 4
    with pytest.raises(UserError, match=r"--count 1: expected at least 2 samples"):
        calibrate(shared_path / "run", comm, count=1)
