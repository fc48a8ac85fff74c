"""Compiled levels: the same numbers, in groups and in samples; and one clear line where there is no compiler."""

from __future__ import annotations

import faulthandler
import sys
from pathlib import Path

import pytest
import torch
from problems import small_config, write_fields
from torch._dynamo.utils import counters

from ddpatch.config import Config
from ddpatch.data.fields import FieldFile
from ddpatch.errors import UserError
from ddpatch.execution import check_compiler
from ddpatch.parallel.comm import Communicator
from ddpatch.run import measure_field, resolve
from ddpatch.sample import Sampler
from ddpatch.train import train
from ddpatch.training import Training

NETWORK: dict[str, object] = {"channels": [4, 4]}
ENCODER_AND_DECODER = 2


@pytest.fixture
def graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many of what torch compiled in this test, into a cache of its own; compilers have five minutes on a slow machine."""
    try:
        check_compiler(small_config(tmp_path / "data.h5", execution={"compile": True}), torch.device("cpu"))
    except UserError as lacking:
        pytest.skip(str(lacking))
    assert sys.__stderr__ is not None
    faulthandler.dump_traceback_later(300, exit=True, file=sys.__stderr__)  # pytest ends it with the test
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    torch.compiler.reset()
    counters.clear()
    return counters["stats"]


def losses(config: Config, comm: Communicator) -> list[float]:
    with FieldFile(config.data.path) as file:
        config = resolve(config, file)
        training = Training(config, file, measure_field(config, file, comm), comm)
        return [training.advance() for _ in range(2)]


def test_compiled_levels_take_the_same_steps_in_groups(tmp_path: Path, graphs: dict[str, int]) -> None:
    data, comm = write_fields(tmp_path / "data.h5"), Communicator()
    expected = losses(small_config(data, model=NETWORK), comm)
    assert not graphs["unique_graphs"]
    grouped = small_config(data, model=NETWORK, execution={"compile": True, "patches_at_once": 2})
    assert losses(grouped, comm) == pytest.approx(expected, rel=1e-9)
    assert graphs["unique_graphs"] == 1 + ENCODER_AND_DECODER  # the encoder without gradients, and both with them


def test_samples_of_compiled_levels_are_the_same(tmp_path: Path, graphs: dict[str, int]) -> None:
    data, comm = write_fields(tmp_path / "data.h5"), Communicator()
    train(small_config(data, model=NETWORK, train={"steps": 1}), tmp_path / "run", comm)
    drawn = [
        Sampler(tmp_path / "run", comm, None, overrides).draw([0], seed=1, solver="dpm++2m", steps=3)
        for overrides in ([], ["execution.compile=true"])
    ]
    assert graphs["unique_graphs"] == ENCODER_AND_DECODER
    torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-9, atol=1e-9)


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"execution\.compile: expected false, got true: .* lacks the C\+\+ compiler no-such"):
        check_compiler(small_config(tmp_path / "data.h5", execution={"compile": True}), torch.device("cpu"))
