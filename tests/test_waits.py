"""The host waits for its device once in a training step, and has the next batch ready by then."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from apart import Apart, Numbers
from problems import small_config, write_fields
from torch import Tensor

from ddpatch.data.fields import FieldFile
from ddpatch.parallel.comm import Communicator
from ddpatch.parallel.imagined import META, ImaginedRanks
from ddpatch.parallel.transport import Alone
from ddpatch.run import measure_field, resolve
from ddpatch.training import Training

READ = "a number"
Settings = dict[str, dict[str, object]]
SETTINGS: list[tuple[int, Settings]] = [
    (1, {}),
    (3, {}),
    (3, {"execution": {"patches_at_once": 1}}),
    (3, {"execution": {"coarse": "sharded"}, "model": {"coarse_keys": 2}}),
    (1, {"domain": {"periodic": [False, True]}, "model": {"positions": 2}}),
]


class Seen(Training):
    """A training that writes down when it reads a batch."""

    waits: list[str]

    def next_batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """As it is."""
        self.waits.append(f"batch of step {self.step + 1}")
        return super().next_batch()


@pytest.mark.parametrize(("ranks", "settings"), SETTINGS, ids=str)
def test_a_step_waits_once(ranks: int, settings: Settings, tmp_path: Path) -> None:
    path = write_fields(tmp_path / "data.h5")
    with FieldFile(path) as file:
        config = resolve(small_config(path, "float64", **settings), file)
        field = measure_field(config, file, Communicator())
        apart = Apart(2, 6)
        Seen.waits = apart.waits
        with apart, Numbers(apart.waits):
            training = Seen(config, file, field, ImaginedRanks(0, ranks, ranks))
            training.advance()  # tables are made, and kept on the device
            apart.taken.clear()
            apart.waits.clear()
            training.advance()
    batch = (2, 6 // ranks, 2, 8, 8)
    assert apart.waits == ["batch of step 3", READ]
    assert [tuple(shape) for shape in apart.taken] == [batch, batch, (2,)] and not apart.brought


def test_an_evaluation_of_one_sample_does_not_wait(tmp_path: Path) -> None:
    path = write_fields(tmp_path / "data.h5")
    with FieldFile(path) as file:
        config = resolve(small_config(path), file)
        training = Training(config, file, measure_field(config, file, Communicator()), ImaginedRanks(0, 1, 1))
        denoise, x = training.denoiser, torch.zeros(1, 6, 2, 8, 8, dtype=torch.float64, device=META)
        apart = Apart(2, 6)
        with torch.no_grad(), apart, Numbers(apart.waits):
            denoise(x, torch.ones(1, dtype=torch.float64, device=META))
            apart.waits.clear()
            apart.taken.clear()
            denoise(x, torch.ones(1, dtype=torch.float64, device=META))
    assert not apart.waits and not apart.taken and not apart.brought


def test_what_waits_is_seen() -> None:
    x = torch.zeros(3, 4, device=META)
    apart = Apart(2, 6)
    with apart, Numbers(apart.waits):
        x[[0, 1]]
        torch.tensor([1.0, 2.0], device=META)
        torch.zeros(5).to(META)
        torch.zeros(5).to(META, non_blocking=True)
        float(x.sum())
        x[0] = 1
    assert apart.waits == ["an index of 2 numbers", "a tensor of numbers", "a copy of [5]", READ]


def test_one_rank_carries_nothing_anywhere() -> None:
    comm = Communicator()
    assert isinstance(comm.transport, Alone)
    x = torch.arange(6.0).view(3, 2)
    found = [comm.allgather(x, [3]), comm.reduce_scatter(x, [3]), comm.allreduce_(x.clone()), comm.finish_sum(comm.start_sum(x))]
    for y in found:
        assert torch.equal(x, y) and x.data_ptr() != y.data_ptr()
    comm.free()
