"""What a training step sends is what docs/performance.md says, by the counters in log.jsonl."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from problems import small_config, write_fields

from ddpatch.config import Config
from ddpatch.data.fields import FieldFile
from ddpatch.decomposition import Decomposition
from ddpatch.model.two_level import count_parameters
from ddpatch.parallel.comm import Communicator
from ddpatch.run import decompose, make_model, measure_field, replicas, resolve
from ddpatch.train import train

pytestmark = pytest.mark.mpi(min_size=1)
SIZE = 4  # bytes of a number


def halo_numbers(grid: Decomposition, rank: int, width: int) -> int:
    """Points of this rank's patches that lie in windows of patches on other ranks, each as often as it does."""
    found = 0
    for patch, offset in product(grid.local_patches(rank), grid.offsets):
        receiver = grid.neighbour(patch, offset)
        if receiver is not None and grid.owner(receiver) != rank:
            found += math.prod(width if o else n for o, n in zip(offset, grid.patch_shape, strict=True))
    return found


def formulas(config: Config, channels: int, parameters: int, size: int) -> dict[str, float]:
    """docs/performance.md: the most that any rank sends in a step, by kind."""
    copies = replicas(config, size)
    grid, samples = decompose(config, size // copies), -(-config.train.batch // copies)
    model, ndim = config.model, len(config.domain.patch)
    tokens = samples * model.tokens**ndim * (model.token_channels + channels) * SIZE
    if config.execution.coarse == "sharded":
        keys_and_values = model.coarse_layers * 2 * model.coarse_width * model.keys**ndim
        tokens = samples * (keys_and_values + (model.coarse_width + channels) * model.tokens**ndim) * SIZE
    return {
        "halo": samples * channels * max(halo_numbers(grid, rank, config.model.reach) for rank in range(grid.size)) * SIZE,
        "allgather": max(grid.counts) * tokens,
        "reduce_scatter": grid.num_patches * tokens,
        "allreduce": parameters * SIZE + 8,
        "union": 8,
    }


@pytest.mark.parametrize(
    ("grid", "settings"),
    [
        ((16, 24), {}),
        ((32, 24), {"train": {"steps": 2, "log_every": 1, "batch": 4}, "execution": {"patches_at_once": 1}}),
        ((16, 24), {"train": {"steps": 2, "log_every": 1, "batch": 4}, "parallel": {"replicas": None}}),
        ((16, 24), {"execution": {"coarse": "sharded"}}),
        ((16, 24), {"execution": {"coarse": "sharded"}, "model": {"coarse_keys": 2}}),
    ],
)
def test_a_step_sends_what_the_formulas_say(
    comm: Communicator, shared_path: Path, grid: tuple[int, int], settings: dict[str, dict[str, Any]]
) -> None:
    data = comm.on_root(lambda: write_fields(shared_path / "data.h5", grid=grid))
    split = settings.get("parallel") is not None and comm.size % 2 == 0
    parallel = {"replicas": 2} if split else {}
    merged = {"train": {"steps": 2, "log_every": 1}, **settings, "parallel": parallel}
    written = small_config(data, "float32", **merged)
    with FieldFile(data) as file:
        config = resolve(written, file)
        parameters = count_parameters(make_model(config, measure_field(config, file, comm)))
        channels = len(file.header.channels)
    train(written, shared_path / "run", comm)
    comm.barrier()
    expected = formulas(config, channels, parameters, comm.size)
    rows = [json.loads(line) for line in (shared_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    gathers = config.model.coarse_layers + 1 if config.execution.coarse == "sharded" else 1
    for row in rows:
        assert row["bytes_per_step"] == expected
        calls = row["calls_per_step"]
        assert {kind: calls[kind] for kind in ("halo", "allgather", "reduce_scatter", "union")} == {
            "halo": 1,
            "allgather": gathers,
            "reduce_scatter": gathers,
            "union": 1,
        }
