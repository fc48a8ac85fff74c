"""The coupling is used: what a trained model predicts in a patch depends on patches out of reach of the halo."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from problems import small_config, smooth_fields

from ddpatch.data.fields import FieldFile
from ddpatch.io.volume import VolumeHeader, write_volume
from ddpatch.model.patches import cut
from ddpatch.parallel.comm import Communicator
from ddpatch.run import measure_field, resolve
from ddpatch.training import Training

GRID, STEPS, SIGMA = (40, 8), 60, 5.0


def fields(samples: int, seed: int) -> np.ndarray:
    """Fields whose patches share an offset, so that every patch tells something of every other, ``[sample, 1, *GRID]``."""
    offset = np.random.default_rng(seed).standard_normal((samples, 1, 1, 1)).astype(np.float32)
    return 0.5 * smooth_fields(samples, 1, GRID, seed) + offset


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.h5"
    write_volume(path, VolumeHeader(128, ("u",), GRID, (1.0, 1.0), (True, True)), iter(fields(128, 0)))
    return path


def trained(data: Path, coupling: str) -> Training:
    config = small_config(
        data, "float32", model={"coupling": coupling}, train={"steps": STEPS, "batch": 8, "learning_rate": 1e-2}
    )
    with FieldFile(data) as file:
        config, comm = resolve(config, file), Communicator()
        training = Training(config, file, measure_field(config, file, comm), comm)
        for _ in range(STEPS):
            training.advance()
    return training


def response(training: Training) -> list[float]:
    """Root mean square change of the prediction in every patch, after patch 0 is replaced by another field's."""
    x, other = (torch.from_numpy(fields(16, seed)) for seed in (5, 6))
    noise = SIGMA * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    before = cut(x + noise, training.decomposition)
    after = before.clone()
    after[:, 0] = cut(other + noise, training.decomposition)[:, 0]
    sigma = torch.full((16,), SIGMA, dtype=torch.float64)
    with torch.no_grad():
        change = training.denoiser(after, sigma) - training.denoiser(before, sigma)
    return [float(change[:, p].square().mean().sqrt()) for p in range(change.shape[1])]


def test_a_trained_model_hears_far_patches(data: Path) -> None:
    """Patches 2 and 3 are no neighbours of patch 0; unit data, so an effect of some hundredths is a real one."""
    assert min(response(trained(data, "two-level"))[2:4]) > 0.02


def test_without_the_coarse_level_it_hears_neighbours_only(data: Path) -> None:
    change = response(trained(data, "halo"))
    assert min(change[1], change[4]) > 0
    assert change[2:4] == [0.0, 0.0]
