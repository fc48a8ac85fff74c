"""A run that leaves N ranks goes on with M as if nothing had happened: the legs on 1 to 4 ranks try all pairs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from problems import small_config, write_fields

from ddpatch.config import Config
from ddpatch.errors import Left
from ddpatch.io import checkpoint
from ddpatch.parallel.comm import Communicator
from ddpatch.train import train

pytestmark = pytest.mark.mpi(min_size=1)


def on_first(count: int, comm: Communicator, action: Callable[[Communicator], None]) -> None:
    """Run something on the first ranks only; the others wait. Collective."""
    ranks = comm.split(int(comm.rank < count))
    if comm.rank < count:
        action(ranks)
    comm.barrier()
    ranks.free()


def leave_after_two_steps(config: Config, folder: Path, ranks: Communicator) -> None:
    for _ in range(2):
        with pytest.raises(Left):
            train(config, folder, ranks, time_limit=0.0)


def test_two_steps_on_n_ranks_and_two_on_m_equal_four_on_n(comm: Communicator, shared_path: Path) -> None:
    """Bit for bit where N = M, to 1e-5 otherwise; every pair with the larger number equal to that of this leg."""
    data = comm.on_root(lambda: write_fields(shared_path / "data.h5"))
    comm.deterministic = True
    config = small_config(data, "float32", train={"steps": 4})
    for n in range(1, comm.size + 1):
        on_first(n, comm, lambda ranks, n=n: train(config, shared_path / f"whole{n}", ranks))  # type: ignore[misc]
        for m in range(1, comm.size + 1) if n == comm.size else [comm.size]:
            folder = shared_path / f"{n}to{m}"
            on_first(n, comm, lambda ranks, folder=folder: leave_after_two_steps(config, folder, ranks))  # type: ignore[misc]
            on_first(m, comm, lambda ranks, folder=folder: train(config, folder, ranks))  # type: ignore[misc]
            whole, parts = (checkpoint.load(path / "checkpoint_00000004.pt") for path in (shared_path / f"whole{n}", folder))
            assert parts["samples_seen"] == whole["samples_seen"] == 8
            tolerance = 0.0 if n == m else 1e-5
            for key in ("model", "ema"):
                torch.testing.assert_close(parts[key], whole[key], rtol=tolerance, atol=tolerance)


def test_rows_of_the_log_after_the_checkpoint_are_written_once(comm: Communicator, shared_path: Path) -> None:
    """A job that was killed after step 3 goes on from the checkpoint of step 2."""
    data = comm.on_root(lambda: write_fields(shared_path / "data.h5"))
    folder = shared_path / "run"
    train(small_config(data, train={"steps": 3, "checkpoint_every": 2}), folder, comm)
    comm.on_root((folder / "checkpoint_00000003.pt").unlink)
    train(small_config(data, train={"steps": 5, "checkpoint_every": 2}), folder, comm)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
