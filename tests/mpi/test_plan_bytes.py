"""A plan's bytes are those that a training step sends."""

from __future__ import annotations

from pathlib import Path

import pytest
from problems import small_config, write_fields

from ddpatch.data.fields import FieldFile
from ddpatch.parallel.comm import Communicator
from ddpatch.rehearsal import imagine, rehearse
from ddpatch.run import measure_field, replicas, resolve
from ddpatch.training import Training

pytestmark = pytest.mark.mpi(min_size=1)


@pytest.mark.parametrize(
    ("coupling", "at_once", "deterministic"),
    [("two-level", None, False), ("two-level", 1, True), ("halo", None, False), ("self-only", 1, False)],
)
def test_bytes_of_a_step_are_those_of_the_counters(
    comm: Communicator, shared_path: Path, coupling: str, at_once: int | None, deterministic: bool
) -> None:
    comm.on_root(lambda: write_fields(shared_path / "data.h5", grid=(32, 24)))
    config = small_config(
        shared_path / "data.h5",
        "float32",
        model={"coupling": coupling},
        execution={"patches_at_once": at_once},
        parallel={"deterministic": deterministic},
    )
    with FieldFile(shared_path / "data.h5") as file:
        config = resolve(config, file)
        comm.deterministic = deterministic
        training = Training(config, file, measure_field(config, file, comm), comm)
        before = training.grid.bytes
        training.advance()
        found = comm.gather(training.grid.bytes - before)
        planned = rehearse(config, file.header, comm.size).step.sent
    player = imagine(config, comm.size, replicas(config, comm.size))
    assert +planned == found[player.rank]
    player.free()
