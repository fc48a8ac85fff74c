"""Losses and gradients that are not finite: no rank takes such a step, and a run of them ends the training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from problems import small_config, write_fields
from torch import Tensor

from ddpatch.data.fields import FieldFile
from ddpatch.errors import UserError
from ddpatch.io import checkpoint
from ddpatch.parallel.comm import Communicator
from ddpatch.run import measure_field, resolve
from ddpatch.train import train
from ddpatch.training import MOST_SKIPPED, Training

pytestmark = pytest.mark.mpi(min_size=1)


@contextmanager
def training_on(path: Path, comm: Communicator) -> Iterator[Training]:
    with FieldFile(path) as file:
        config = resolve(small_config(path), file)
        yield Training(config, file, measure_field(config, file, comm), comm)


def poison(monkeypatch: pytest.MonkeyPatch, steps: range, rank: int) -> None:
    """Noise that is not a number, in one patch of one rank, in some steps."""
    read = Training.next_batch

    def next_batch(self: Training) -> tuple[Tensor, Tensor, Tensor]:
        clean, noise, sigma = read(self)
        if self.step in steps and self.comm.rank == rank:
            noise[0, 0] = math.nan
        return clean, noise, sigma

    monkeypatch.setattr(Training, "next_batch", next_batch)


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(
    comm: Communicator, shared_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = comm.on_root(lambda: write_fields(shared_path / "data.h5"))
    poison(monkeypatch, range(1, 2), comm.size - 1)
    with training_on(data, comm) as training:
        assert math.isfinite(training.advance())
        before = [p.detach().clone() for p in training.model.parameters()]
        assert math.isnan(training.advance())
        assert all(torch.equal(a, b) for a, b in zip(before, training.model.parameters(), strict=True))
        assert (training.step, training.samples_seen, training.skipped) == (2, 2 * training.config.train.batch, 1)
        assert math.isfinite(training.advance()) and training.in_a_row == 0
        assert all(torch.isfinite(p).all() for p in training.model.parameters())


def test_too_many_in_a_row_end_the_run_with_its_last_checkpoint(
    comm: Communicator, shared_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = comm.on_root(lambda: write_fields(shared_path / "data.h5"))
    poison(monkeypatch, range(3, 100), 0)
    config = small_config(data, train={"steps": 40, "checkpoint_every": 2})
    with pytest.raises(UserError, match=rf"not finite in {MOST_SKIPPED} steps in a row, from step 4 on"):
        train(config, shared_path / "run", comm)
    state = checkpoint.load_latest(shared_path / "run", comm)[1]
    assert state["step"] == 12 and all(torch.isfinite(v).all() for v in state["model"].values())
