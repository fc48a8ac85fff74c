"""Calibration finds by how much a denoiser takes the noise for too much, on any number of ranks; sampling uses what it found."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path

import h5py
import pytest
import torch
from problems import field_of, small_config, write_fields

from ddpatch.calibrate import calibrate, held
from ddpatch.diffusion.level_scale import LevelScale
from ddpatch.diffusion.solvers import make_solver
from ddpatch.errors import UserError
from ddpatch.parallel.comm import Communicator
from ddpatch.sample import Sampler, sample
from ddpatch.train import train

pytestmark = pytest.mark.mpi(min_size=1)


@pytest.mark.parametrize("solver", ["heun", "dpm++2m"])
def test_the_scale_undoes_noise_that_is_taken_for_more(comm: Communicator, solver: str) -> None:
    """A denoiser that takes σ / (1 + 0.03 c_in(σ)) for σ."""
    noise, sigmas = torch.randn(4, 50, dtype=torch.float64), torch.logspace(1, -2, 12, dtype=torch.float64)
    told = sigmas / (1 + 0.03 / (1 + sigmas.square()).sqrt())

    def exact(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x / (1 + sigma[:, None] ** 2)

    def too_much(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return exact(x, sigma * float((sigmas / told)[(told - sigma[0]).abs().argmin()]))

    expected = make_solver(solver, exact).solve(noise, sigmas)
    torch.testing.assert_close(make_solver(solver, too_much, LevelScale((1.03,))).solve(noise, sigmas), expected)
    assert make_solver(solver, too_much).solve(noise, sigmas).var() < 0.99 * expected.var()


def take_noise_for(monkeypatch: pytest.MonkeyPatch, more: Callable[[float], float]) -> None:
    """From here on samplers take σ for σ (1 + more(σ) c_in)."""
    made = Sampler.__init__

    def mistaken(self: Sampler, *args: object, **options: object) -> None:
        made(self, *args, **options)  # type: ignore[arg-type]
        exact = self.denoise
        self.denoise = lambda x, sigma: exact(x, sigma * (1 + more(float(sigma[0])) / (1 + sigma.square()).sqrt()))  # type: ignore[assignment]

    monkeypatch.setattr(Sampler, "__init__", mistaken)


def test_energy_that_a_denoiser_loses_comes_back(comm: Communicator, shared_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is the exact linear denoiser and a little noise. What takes noise for 0.05 more at the end needs 0.05 more
    of the scale; what takes it for half has too much energy, which is not what the scale is for.
    """
    data = comm.on_root(lambda: write_fields(shared_path / "data.h5", samples=32))
    train(small_config(data, "float32", train={"steps": 1, "batch": 8}, model={"halo": 4}), shared_path / "run", comm)
    right = calibrate(shared_path / "run", comm, count=16, steps=10)
    with monkeypatch.context() as patched:
        take_noise_for(patched, lambda sigma: 0.05)
        found = calibrate(shared_path / "run", comm, count=16, steps=10)
    assert found["level_scale"].levels == right["level_scale"].levels
    assert found["level_scale"].values == pytest.approx([v + 0.05 for v in right["level_scale"].values], abs=5e-3)
    assert found["energy"] < right["energy"] - 0.005
    take_noise_for(monkeypatch, lambda sigma: -0.5)
    seen: list[tuple[int, int]] = []
    with pytest.raises(UserError, match=r"energy of samples is off by \+.*, expected what a noise scale from 0.8 to 2.0 mends"):
        calibrate(shared_path / "run", comm, count=16, steps=10, progress=lambda *done: seen.append(done))
    assert seen[-1][0] < seen[-1][1]  # the samples that cost most are not drawn
    comm.barrier()
    assert not list((shared_path / "run").glob(".calibration*"))


def test_the_spectrum_comes_back_where_the_denoiser_loses_it(
    comm: Communicator, shared_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is lost at low noise only, in the smaller shells, is found there: one number for all levels would spread it."""
    data = comm.on_root(lambda: write_fields(shared_path / "data.h5", samples=32))
    train(small_config(data, "float32", train={"steps": 1, "batch": 8}, model={"halo": 4}), shared_path / "run", comm)
    right = calibrate(shared_path / "run", comm, count=16, steps=20)
    levels = right["level_scale"].levels
    middle = math.sqrt(levels[0] * levels[-1])
    take_noise_for(monkeypatch, lambda sigma: 0.2 if sigma < middle else 0.0)
    found = calibrate(shared_path / "run", comm, count=16, steps=20)
    more = [b - a for a, b in zip(right["level_scale"].values, found["level_scale"].values, strict=True)]
    assert min(more[:2]) > 0.1 and max(map(abs, more[3:])) < 0.06
    assert found["spectrum"][1] < 0.3 * found["spectrum"][0]


def test_samples_that_are_not_finite_are_refused(comm: Communicator, shared_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = comm.on_root(lambda: write_fields(shared_path / "data.h5"))
    train(small_config(data, "float32", train={"steps": 1}), shared_path / "run", comm)
    monkeypatch.setattr("ddpatch.calibrate.shell_energies", lambda path, field, comm: torch.full((8, 5), math.nan))
    with pytest.raises(UserError, match="samples are not finite numbers, expected fields"):
        calibrate(shared_path / "run", comm, count=8, steps=3)


def test_only_shells_that_the_data_hold_are_asked() -> None:
    field = field_of(torch.ones(4, 4, dtype=torch.float64), 1, (1, 1), (1, 1))
    field = replace(field, spectrum=((0.0, 2.0, 1e-6, 0.0, 1.0), (1.0,) * 5))
    assert held(field, 4).tolist() == [0, 3]


def scale_and_warnings(sampler: Sampler, steps: int) -> tuple[LevelScale, list[str]]:
    """The scale for some steps of Heun's method, and what every rank says of it."""
    with redirect_stderr(StringIO()) as said:
        scale = sampler.level_scale("heun", steps)
    return scale, sampler.comm.gather(said.getvalue())


def test_sampling_takes_what_was_calibrated_for_its_checkpoint_and_levels(comm: Communicator, shared_path: Path) -> None:
    """Without a word where there is no calibration, with a warning of rank 0 where there is one of something else."""
    data = comm.on_root(lambda: write_fields(shared_path / "data.h5"))
    run, kept = shared_path / "run", shared_path / "run" / "calibration.json"
    train(small_config(data, "float32", train={"steps": 1}), run, comm)
    sampler, nothing = Sampler(run, comm), [""] * comm.size
    assert scale_and_warnings(sampler, 3) == (LevelScale(), nothing)
    comm.on_root(lambda: kept.write_text(json.dumps({**sampler.setting("heun", 3), "level_scale": 1.02})))
    assert scale_and_warnings(sampler, 3) == (LevelScale((1.02,)), nothing)
    scale, warnings = scale_and_warnings(sampler, 4)
    assert scale == LevelScale() and warnings[1:] == nothing[1:]
    assert "calibration.json: not used, for it is of another number of steps; run ddpatch calibrate again" in warnings[0]
    sample(sampler, shared_path / "samples.h5", 1, "heun", 3)
    with h5py.File(shared_path / "samples.h5") as file:
        assert file["fields"].attrs["noise_scale"].tolist() == [1.02]
    assert Sampler(run, comm, overrides=["sample.noise_scale=1.5"]).level_scale("heun", 3) == LevelScale((1.5,))
    comm.barrier()
    earlier = {**sampler.setting("heun", 3), "levels": [8.0, 1.0, 0.3, 0.0], "level_scale": 1.02}
    comm.on_root(lambda: kept.write_text(json.dumps(earlier)))
    scale, warnings = scale_and_warnings(sampler, 3)
    assert scale == LevelScale() and "of another choice of noise levels" in warnings[0]
    apart = '{"level_scale": {"values": [1.02, 1.01], "levels": [1.0]}}'
    descending = '{"level_scale": {"values": [1.02, 1.01], "levels": [1.0, 0.5]}}'
    for mistaken in ("{}}", '{"checkpoint": "of an earlier version", "noise_scale": 1.02}', apart, descending):
        comm.barrier()
        comm.on_root(partial(kept.write_text, mistaken))
        with pytest.raises(UserError, match=r"calibration\.json: not what ddpatch calibrate writes"):
            sampler.level_scale("heun", 3)
