"""Tuning takes all patches where they fit into memory, else the fastest of groups that do, the same on all ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from problems import small_config, unit_field

from ddpatch import tuning
from ddpatch.config import Config
from ddpatch.errors import UserError
from ddpatch.execution import with_groups
from ddpatch.io.volume import VolumeHeader
from ddpatch.machine import spare_share
from ddpatch.parallel.comm import Communicator
from ddpatch.rehearsal import rehearse
from ddpatch.tuning import cache_path, choose_groups

pytestmark = pytest.mark.mpi(min_size=1)
CPU = torch.device("cpu")
HEADER = VolumeHeader(1, ("u", "v"), (64, 64), (1.0, 1.0), (True, True))
Choice = Callable[[float], int | None]


def configured() -> Config:
    domain: dict[str, object] = {"grid": (64, 64), "patch": (8, 8), "periodic": (True, True)}
    return small_config(Path("none"), "float32", domain=domain, model={"wiener": False, "tokens": 1}, execution={"tune": True})


@pytest.fixture
def chosen(comm: Communicator, shared_path: Path, monkeypatch: pytest.MonkeyPatch) -> Choice:
    """The choice with some free memory, where a patch takes a byte."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared_path))
    monkeypatch.setattr(tuning, "needed", lambda config, at_once, *_: float(at_once))

    def choose(free: float) -> int | None:
        monkeypatch.setattr(tuning, "free_memory", lambda device, comm: free / tuning.SAFE * (1 + 1e-9))
        found = choose_groups(configured(), HEADER, unit_field(2, 2), comm, CPU).execution.patches_at_once
        assert set(comm.gather(found)) == {found}
        return found

    return choose


def test_all_patches_go_together_where_they_fit(comm: Communicator, chosen: Choice) -> None:
    assert chosen(1e12) is None
    comm.barrier()
    assert not cache_path().exists()


def test_the_fastest_group_that_fits_is_measured_once(
    comm: Communicator, chosen: Choice, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def measure(config: Config, at_once: int, *_: object) -> float:
        measured.append(at_once)
        return {1: 3.0, 2: 1.0 + comm.rank, 4: 2.5}[at_once]

    monkeypatch.setattr(tuning, "measure", measure)
    expected = 2 if comm.size < 3 else 4  # on the slowest rank, the last, two take its number + 1
    assert chosen(4) == expected
    assert chosen(5) == expected
    assert measured == [1, 2, 4]
    comm.barrier()
    comm.on_root(lambda: cache_path().write_text("{"))  # a damaged cache is measured anew
    assert chosen(7) == expected
    assert measured == [1, 2, 4] * 2


def test_a_measured_step_takes_time(comm: Communicator, chosen: Choice) -> None:
    assert chosen(2) in (1, 2)
    comm.barrier()
    kept = tuning.read_cache(cache_path())
    assert len(kept) == 2 and all(seconds > 0 for seconds in kept.values())


def test_too_little_memory_is_a_line_on_all_ranks(chosen: Choice) -> None:
    with pytest.raises(UserError, match="too little for one patch at a time; ddpatch plan says what to change"):
        chosen(0.5)


def test_what_is_needed_follows_the_plan(comm: Communicator) -> None:
    config = with_groups(configured(), None)
    found = tuning.needed(config, 1, HEADER, comm, CPU)
    assert found == rehearse(with_groups(config, 1), HEADER, comm.size).step.memory.total() * (1 + spare_share(CPU))


def test_without_tune_nothing_changes(comm: Communicator) -> None:
    config = configured()
    plain = dataclasses.replace(config, execution=dataclasses.replace(config.execution, tune=False))
    assert choose_groups(with_groups(plain, 3), HEADER, unit_field(2, 2), comm, CPU).execution.patches_at_once == 3
