"""Replicas: the factorisation of the ranks changes nothing, and gradients of the same step are summed once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from problems import small_config, write_fields
from torch import nn

from ddpatch.config import Config
from ddpatch.data.fields import FieldFile
from ddpatch.errors import UserError
from ddpatch.io import checkpoint
from ddpatch.parallel.comm import Communicator
from ddpatch.parallel.gradients import GradientSum
from ddpatch.parallel.grid import choose_replicas
from ddpatch.run import measure_field, resolve
from ddpatch.train import train
from ddpatch.training import Training

pytestmark = pytest.mark.mpi(min_size=1)


def losses(config: Config, comm: Communicator) -> list[float]:
    with FieldFile(config.data.path) as file:
        config = resolve(config, file)
        training = Training(config, file, measure_field(config, file, comm), comm)
        return [training.advance() for _ in range(5)]


@pytest.mark.parametrize(
    ("dtype", "tolerance", "transport"), [("float64", 1e-10, "host"), ("float32", 1e-5, "host"), ("float64", 1e-10, "torch")]
)
def test_losses_are_equal_for_every_factorisation(
    comm: Communicator, shared_path: Path, dtype: str, tolerance: float, transport: str
) -> None:
    """A batch of 5, which 2, 3 and 4 replicas share unequally."""
    data = comm.on_root(lambda: write_fields(shared_path / "data.h5"))
    comm.deterministic = transport == "host"
    serial = losses(small_config(data, dtype, train={"batch": 5}), comm.split(comm.rank))
    for replicas in (r for r in range(1, comm.size + 1) if comm.size % r == 0):
        config = small_config(data, dtype, train={"batch": 5}, parallel={"replicas": replicas, "transport": transport})
        assert losses(config, comm) == pytest.approx(serial, rel=tolerance), replicas


def test_a_run_goes_on_with_another_factorisation(comm: Communicator, shared_path: Path) -> None:
    data = comm.on_root(lambda: write_fields(shared_path / "data.h5"))
    whole, parts = shared_path / f"whole{comm.rank}", shared_path / "parts"
    train(small_config(data, train={"steps": 4, "batch": 4}), whole, comm.split(comm.rank))
    for steps, replicas in ((2, comm.size), (4, 1)):
        config = small_config(data, train={"steps": 4, "batch": 4, "checkpoint_every": 2}, parallel={"replicas": replicas})
        train_until(config, steps, parts, comm)
    states = [checkpoint.load_latest(folder, comm.split(comm.rank))[1] for folder in (whole, parts)]
    torch.testing.assert_close(states[1]["model"], states[0]["model"], rtol=1e-10, atol=1e-10)


def train_until(config: Config, steps: int, folder: Path, comm: Communicator) -> None:
    """Train, and forget the checkpoints that are later than a step, as a job does that was killed then."""
    train(config, folder, comm)
    for path in comm.broadcast(checkpoint.find_all(folder)):
        if comm.rank == 0 and int(path.stem[-8:]) > steps:
            path.unlink()
    comm.barrier()


def test_buckets_that_start_in_the_backward_pass_give_the_sums(comm: Communicator) -> None:
    """Several buckets, one parameter without gradient, and several steps with the same hooks."""
    torch.manual_seed(0)
    layers = [nn.Linear(5, 5) for _ in range(4)]
    parameters = [p for layer in layers for p in layer.parameters()]
    gradients = GradientSum(parameters, comm, bucket_bytes=100)
    assert len(gradients.buckets) > 2
    for step in range(3):
        for p in parameters:
            p.grad = None
        x = torch.full((2, 5), float(comm.rank + step))
        for layer in layers[:3]:
            x = layer(x).tanh()
        x.sum().backward()
        own = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        gradients.finish()
        for p, mine in zip(parameters, own, strict=True):
            assert p.grad is not None
            torch.testing.assert_close(p.grad, comm.allreduce_(mine))


def test_the_smallest_number_of_replicas_that_gives_every_rank_a_patch() -> None:
    assert [choose_replicas(size, 4, 8) for size in (1, 2, 3, 4, 6, 8, 12)] == [1, 1, 1, 1, 2, 2, 3]
    assert choose_replicas(4, 4, 8, wanted=2) == 2
    with pytest.raises(UserError, match="5 ranks cannot be divided"):
        choose_replicas(5, 4, 4)
    for wanted in (3, 8):
        with pytest.raises(UserError, match=f"parallel.replicas: {wanted} do not fit 4 ranks"):
            choose_replicas(4, 4, 8, wanted)
