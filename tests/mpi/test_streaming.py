"""Groups of patches change memory and time only: losses, gradients and samples are those of all patches at once."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from networks import GRIDS, PATCHED, assert_same, configured, gradients
from problems import small_config, write_fields

from ddpatch.config import ExecutionConfig
from ddpatch.data.fields import FieldFile
from ddpatch.errors import UserError
from ddpatch.parallel.comm import Communicator
from ddpatch.run import decompose, measure_field, resolve
from ddpatch.sample import Sampler
from ddpatch.train import train
from ddpatch.training import Training

pytestmark = pytest.mark.mpi(min_size=1)


@contextmanager
def training_of(data: Path, at_once: int | None, comm: Communicator) -> Iterator[Training]:
    with FieldFile(data) as file:
        config = resolve(small_config(data, execution={"patches_at_once": at_once}), file)
        yield Training(config, file, measure_field(config, file, comm), comm)


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize(("grid", "patch", "periodic"), GRIDS)
def test_losses_and_gradients_in_groups_equal_those_of_all_patches_at_once(
    comm: Communicator, grid: tuple[int, ...], patch: tuple[int, ...], periodic: tuple[bool, ...], at_once: int
) -> None:
    reference, streamed = (gradients(configured(n, "two-level", grid, patch, periodic), comm) for n in (None, at_once))
    assert_same([streamed[0], *streamed[1]], [reference[0], *reference[1]])


@pytest.mark.parametrize("coupling", PATCHED)
def test_every_coupling_runs_in_groups(comm: Communicator, coupling: str) -> None:
    """Groups of 4 of the 6 patches of a rank do not come out even."""
    reference, streamed = (gradients(configured(n, coupling, *GRIDS[0]), comm) for n in (None, 4 if comm.size == 1 else 1))
    assert_same([streamed[0], *streamed[1]], [reference[0], *reference[1]])


@pytest.mark.parametrize("at_once", [None, 1])
def test_a_step_communicates_once_per_direction(comm: Communicator, at_once: int | None) -> None:
    gradients(configured(at_once, "two-level", *GRIDS[0]), comm)
    assert {kind: comm.calls[kind] for kind in ("halo", "allgather", "reduce_scatter")} == {
        "halo": 2,  # the second one since the field has a gradient here
        "allgather": 1,
        "reduce_scatter": 1,
    }


def test_a_step_in_groups_encodes_three_times_and_decodes_once(comm: Communicator, shared_path: Path) -> None:
    data = comm.on_root(lambda: write_fields(shared_path / "data.h5"))
    with training_of(data, 1, comm) as training:
        ran: Counter[str] = Counter()
        training.model.encoder.register_forward_hook(lambda *_: ran.update(["encoder"]))
        training.model.decoder.register_forward_hook(lambda *_: ran.update(["decoder"]))
        training.advance()
    own = len(training.coupling.patches)
    assert ran == {"encoder": 3 * own if own > 1 else 1, "decoder": own}


def test_a_loss_without_gradients_is_the_same_and_computes_none(comm: Communicator, shared_path: Path) -> None:
    data = comm.on_root(lambda: write_fields(shared_path / "data.h5"))
    losses = []
    for at_once in (None, 1):
        with training_of(data, at_once, comm) as training, torch.no_grad():
            losses.append(training.denoiser.loss(*training.next_batch()))
        assert not losses[-1].requires_grad
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=0)


def test_training_in_groups_takes_the_same_steps(comm: Communicator, shared_path: Path) -> None:
    data = comm.on_root(lambda: write_fields(shared_path / "data.h5"))
    losses = []
    for at_once in (None, 1):
        with training_of(data, at_once, comm) as training:
            losses.append([training.advance() for _ in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)


def test_samples_in_groups_are_the_same(comm: Communicator, shared_path: Path) -> None:
    data = comm.on_root(lambda: write_fields(shared_path / "data.h5"))
    train(small_config(data, train={"steps": 1}, execution={"patches_at_once": 1}), shared_path / "run", comm)
    most = max(decompose(Sampler(shared_path / "run", comm).config, comm.size).counts)
    drawn = [
        Sampler(shared_path / "run", comm, None, overrides).draw([0, 1], seed=1, solver="dpm++2m", steps=4, shift=True)
        for overrides in ([], [f"execution.patches_at_once={most}"], ["sample.on_host=true", "execution.patches_at_once=1"])
    ]
    torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(drawn[0], drawn[2], rtol=0, atol=0)


def test_sampling_leaves_tuning_to_the_training(comm: Communicator, shared_path: Path) -> None:
    data = comm.on_root(lambda: write_fields(shared_path / "data.h5"))
    train(small_config(data, train={"steps": 1}, execution={"tune": True}), shared_path / "run", comm)
    assert Sampler(shared_path / "run", comm).config.execution == ExecutionConfig()
    with pytest.raises(UserError, match=r"execution\.tune: expected false, got true: a training chooses"):
        Sampler(shared_path / "run", comm, None, ["execution.tune=true"])


def test_a_group_larger_than_a_rank_is_refused_on_all_ranks(comm: Communicator, shared_path: Path) -> None:
    data = comm.on_root(lambda: write_fields(shared_path / "data.h5"))
    config, most = small_config(data, train={"steps": 1}), -(-6 // comm.size)
    message = rf"execution.patches_at_once: expected at most {most}, got 7: 6 patches over {comm.size} ranks are at most {most}"
    too_many = dataclasses.replace(config, execution=ExecutionConfig(7))
    with pytest.raises(UserError, match=message):
        train(too_many, shared_path / "run", comm)
    train(dataclasses.replace(config, execution=ExecutionConfig(most)), shared_path / "run", comm)
    with pytest.raises(UserError, match=message):
        Sampler(shared_path / "run", comm, None, ["execution.patches_at_once=7"])
