"""The coarse level with the tokens of every rank on that rank: the same numbers and gradients, with a gather per block."""

from __future__ import annotations

import dataclasses

import pytest
from networks import GRIDS, PATCHED, assert_same, configured, gradients

from ddpatch.config import Config
from ddpatch.couplings import COUPLINGS
from ddpatch.model import two_level
from ddpatch.parallel.comm import Communicator

pytestmark = pytest.mark.mpi(min_size=1)


def executed(config: Config, coarse: str) -> Config:
    return dataclasses.replace(config, execution=dataclasses.replace(config.execution, coarse=coarse))


@pytest.mark.parametrize("at_once", [None, 1])
@pytest.mark.parametrize(("grid", "patch", "periodic"), GRIDS)
def test_losses_and_gradients_of_shards_equal_those_of_replicas(
    comm: Communicator, grid: tuple[int, ...], patch: tuple[int, ...], periodic: tuple[bool, ...], at_once: int | None
) -> None:
    config = configured(at_once, "two-level", grid, patch, periodic)
    replicated, sharded = (gradients(executed(config, coarse), comm) for coarse in ("replicated", "sharded"))
    assert_same([sharded[0], *sharded[1]], [replicated[0], *replicated[1]])


@pytest.mark.parametrize("coupling", [name for name in PATCHED if COUPLINGS[name].coarse])
def test_every_coupling_with_tokens_can_be_sharded(comm: Communicator, coupling: str) -> None:
    config = configured(None, coupling, *GRIDS[0])
    replicated, sharded = (gradients(executed(config, coarse), comm) for coarse in ("replicated", "sharded"))
    assert_same([sharded[0], *sharded[1]], [replicated[0], *replicated[1]])


@pytest.mark.parametrize("keys", [1, 2])
def test_tokens_can_attend_to_means(comm: Communicator, keys: int) -> None:
    """Of a patch's 16 tokens, in shards as in replicas; the option is not without effect."""
    whole = configured(None, "two-level", *GRIDS[0])
    config = dataclasses.replace(whole, model=dataclasses.replace(whole.model, coarse_keys=keys))
    replicated, sharded = (gradients(executed(config, coarse), comm) for coarse in ("replicated", "sharded"))
    assert_same([sharded[0], *sharded[1]], [replicated[0], *replicated[1]])
    assert float((replicated[0] - gradients(whole, comm)[0]).abs()) > 1e-6 * float(replicated[0])


@pytest.mark.parametrize(("least", "gathers"), [(1, 3), (10**9, 1)])
def test_the_number_of_tokens_decides(comm: Communicator, monkeypatch: pytest.MonkeyPatch, least: int, gathers: int) -> None:
    """Keys and values in each of two blocks, and what the tokens have become, in place of one gather of tokens."""
    monkeypatch.setattr(two_level, "SHARDED_FROM", least)
    config = configured(None, "two-level", *GRIDS[0])
    assert config.model.coarse_layers == 2
    gradients(config, comm)
    assert comm.calls["allgather"] == comm.calls["reduce_scatter"] == gathers
