"""Leaving and going on: a run that stops after every step equals one that does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from problems import small_config, write_fields

from ddpatch.errors import Left
from ddpatch.io import checkpoint
from ddpatch.notice import Notice
from ddpatch.parallel.comm import Communicator
from ddpatch.train import train

pytestmark = pytest.mark.mpi(min_size=1)


def test_a_run_that_leaves_after_every_step_equals_one_that_does_not(comm: Communicator, shared_path: Path) -> None:
    data = comm.on_root(lambda: write_fields(shared_path / "data.h5"))
    comm.deterministic = True
    config = small_config(data, "float32", train={"steps": 4})
    train(config, shared_path / "whole", comm)
    for step in (1, 2, 3):
        with pytest.raises(Left, match=f"after step {step}, with a checkpoint"):
            train(config, shared_path / "parts", comm, time_limit=0.0)
    train(config, shared_path / "parts", comm, time_limit=0.0)
    whole, parts = (checkpoint.load_latest(shared_path / name, comm)[1] for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 4 and whole["samples_seen"] == parts["samples_seen"] == 8
    for key in ("model", "ema"):
        assert all(torch.equal(whole[key][name], parts[key][name]) for name in whole[key])


def test_notice_to_one_rank_is_notice_to_all(comm: Communicator, shared_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = comm.on_root(lambda: write_fields(shared_path / "data.h5"))
    monkeypatch.setattr(Notice, "given", lambda self: comm.rank == comm.size - 1)
    with pytest.raises(Left, match="after step 1,"):
        train(small_config(data), shared_path / "run", comm)
    assert [path.name for path in checkpoint.find_all(shared_path / "run")] == ["checkpoint_00000001.pt"]
