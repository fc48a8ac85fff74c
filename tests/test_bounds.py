"""Trained couplings against exact bounds on Gaussian fields: what only communication can reach, and what it does reach."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from problems import small_config

from ddpatch.data.fields import FieldFile
from ddpatch.data.gaussian import PowerLaw, draw
from ddpatch.io.volume import VolumeHeader, write_volume
from ddpatch.parallel.comm import Communicator
from ddpatch.random import Stream, generator
from ddpatch.run import measure_field, resolve
from ddpatch.statistics.oracle import GaussianOracle, noise_level
from ddpatch.training import Training

GRID, PATCH, STEPS = (32, 32), (8, 8), 300
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9)
POWER = PowerLaw(2.0, 2.0).power(GRID)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.h5"
    fields = (draw(POWER, generator(0, Stream.SIMULATION, i))[None].float().numpy() for i in range(512))
    write_volume(path, VolumeHeader(512, ("u",), GRID, (1.0, 1.0), (True, True)), fields)
    return path


def shares(data: Path, coupling: str) -> tuple[list[float], list[float]]:
    """Share of the gap between the patch-alone and the global optimum that a trained model closes, and its error, by level."""
    config = small_config(
        data,
        "float32",
        model={"coupling": coupling, "channels": [16, 32], "coarse_width": 32, "halo": 2},
        train={"steps": STEPS, "batch": 8, "learning_rate": 5e-3, "ema": 400.0, "warmup": 20},
    )
    with FieldFile(data) as file:
        config, comm = resolve(config, file), Communicator()
        training = Training(config, file, measure_field(config, file, comm), comm)
        for _ in range(STEPS):
            training.advance()
    training.model.load_state_dict(training.average.module.state_dict())
    oracle, scale, closed, errors = GaussianOracle(POWER), training.field.normalisation.std[0], [], []
    for level, u in enumerate(LEVELS):
        sigma = noise_level(u)
        randoms = (generator(1, Stream.SIMULATION, i, level) for i in range(64))
        with torch.no_grad():
            distances = oracle.distances(
                lambda x, s: training.denoiser(x / scale, s / scale) * scale, training.decomposition, sigma, randoms
            )
        gap = oracle.patch(PATCH, sigma) - oracle.everything(sigma)
        closed.append(1 - float(distances.mean()) / gap)
        errors.append(float(distances.std()) / 8 / gap)
    return closed, errors


def test_the_default_coupling_beats_every_denoiser_of_a_patch_alone(data: Path) -> None:
    for share, error in zip(*shares(data, "two-level"), strict=True):
        assert share > 4 * error


def test_the_same_network_without_exchange_does_not(data: Path) -> None:
    for share, error in zip(*shares(data, "self-only"), strict=True):
        assert share < 4 * error
