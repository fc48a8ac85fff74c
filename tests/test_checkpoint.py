"""Checkpoints: what goes in comes out, and what should not be trusted is refused."""

from __future__ import annotations

import pickle
import resource
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ddpatch.errors import UserError
from ddpatch.io import checkpoint
from ddpatch.io.seal import seal
from ddpatch.parallel.comm import Communicator


def trained(width: int = 6, steps: int = 3, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, width), nn.SiLU(), nn.Linear(width, 2))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        train_step(model, optimiser)
    return model, optimiser


def train_step(model: nn.Module, optimiser: torch.optim.Optimizer) -> float:
    optimiser.zero_grad()
    loss: torch.Tensor = model(torch.linspace(-1, 1, 20).reshape(5, 4)).square().sum()
    loss.backward()
    optimiser.step()
    return loss.item()


def state_of(model: nn.Module, optimiser: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    return {
        "config": {"domain": {"patch": [8, 8], "grid": None}, "data": {"path": "data.h5"}},
        "model": model.state_dict(),
        "ema": {name: tensor * 0.5 for name, tensor in model.state_dict().items()},
        "optimiser": optimiser.state_dict(),
        "step": step,
        "samples_seen": 4 * step,
        "statistics": {"mean": [0.5, -1.0], "deviation": 2.0},
    }


def test_a_restored_run_continues_bit_for_bit(tmp_path: Path) -> None:
    model, optimiser = trained()
    saved = checkpoint.save(tmp_path, state_of(model, optimiser, 3), Communicator())
    expected = [train_step(model, optimiser) for _ in range(3)]
    path, state = checkpoint.load_latest(tmp_path, Communicator())
    other, other_optimiser = trained(steps=0, seed=1)
    checkpoint.restore_weights(other, state["model"], path)
    other_optimiser.load_state_dict(state["optimiser"])
    assert path == saved and saved.name == "checkpoint_00000003.pt"
    assert [train_step(other, other_optimiser) for _ in range(3)] == expected
    for key in ("config", "step", "samples_seen", "statistics"):
        assert state[key] == state_of(model, optimiser, 3)[key]


def test_the_last_two_checkpoints_are_kept_and_the_newest_is_loaded(tmp_path: Path) -> None:
    model, optimiser = trained(steps=1)
    for step in (5, 90, 100, 1000):
        checkpoint.save(tmp_path, state_of(model, optimiser, step), Communicator())
    assert [path.name for path in checkpoint.find_all(tmp_path)] == ["checkpoint_00000100.pt", "checkpoint_00001000.pt"]
    assert len(list(tmp_path.iterdir())) == 3 and (tmp_path / "latest").resolve().name == "checkpoint_00001000.pt"
    assert checkpoint.load_latest(tmp_path, Communicator())[1]["step"] == 1000


def test_checkpoints_of_multiples_of_some_steps_are_kept_besides(tmp_path: Path) -> None:
    with checkpoint.CheckpointWriter(tmp_path, Communicator(), keep_last=1, keep_every=100) as writer:
        for step in (50, 100, 150, 200, 250):
            writer.save(state_of(*trained(steps=1), step))
    assert [int(path.stem[-8:]) for path in checkpoint.find_all(tmp_path)] == [100, 200, 250]


def test_what_is_written_in_the_background_is_the_state_at_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimiser = trained()
    expected, free, write = {k: v.clone() for k, v in model.state_dict().items()}, threading.Event(), checkpoint._write

    def later(path: Path, state: dict[str, Any]) -> None:
        assert free.wait(20)
        write(path, state)

    monkeypatch.setattr(checkpoint, "_write", later)
    with checkpoint.CheckpointWriter(tmp_path, Communicator()) as writer:
        writer.save(state_of(model, optimiser, 3))
        assert not checkpoint.find_all(tmp_path)  # nobody has waited for it
        for _ in range(3):
            train_step(model, optimiser)
        free.set()
    written = checkpoint.load_latest(tmp_path, Communicator())[1]["model"]
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


def test_a_failure_in_the_background_is_raised_by_the_next_call(tmp_path: Path) -> None:
    writer = checkpoint.CheckpointWriter(tmp_path / "gone", Communicator())
    (tmp_path / "gone").write_text("a file where a folder should be")
    writer.save(state_of(*trained(), 1))
    with pytest.raises(UserError, match="gone"):
        writer.save(state_of(*trained(), 2))


def test_a_failing_write_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    model, optimiser = trained(width=20000)
    checkpoint.save(tmp_path, state_of(model, optimiser, 1), Communicator())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the system refuses to write more: a full disk
    try:
        with pytest.raises(UserError, match=r"checkpoint_00000002\.pt: cannot write the checkpoint"):
            checkpoint.save(tmp_path, state_of(model, optimiser, 2), Communicator())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_00000001.pt", "latest"]
    assert checkpoint.load_latest(tmp_path, Communicator())[1]["step"] == 1


def test_values_that_could_not_be_loaded_are_not_saved(tmp_path: Path) -> None:
    state = state_of(*trained(), 1) | {"statistics": {"path": Path("x")}}
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.save(tmp_path, state, Communicator())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"hello", b"\nsha256 " + b"0" * 64])
def test_another_content_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "checkpoint_00000001.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"checkpoint_00000001\.pt: cannot be read as a checkpoint") as error:
        checkpoint.load_latest(tmp_path, Communicator())
    assert "\n" not in str(error.value)


def test_a_flip_or_a_cut_anywhere_is_detected(tmp_path: Path) -> None:
    """In every stretch of 16 bytes of a file: headers, pickle, every tensor, padding, directory and checksum."""
    path = checkpoint.save(tmp_path, state_of(*trained(), 1), Communicator())
    whole, random = path.read_bytes(), np.random.default_rng(0)
    for start in range(0, len(whole), 16):
        place = min(start + int(random.integers(16)), len(whole) - 1)
        flipped = whole[:place] + bytes([whole[place] ^ (1 << int(random.integers(8)))]) + whole[place + 1 :]
        for damaged in (flipped, whole[:place], whole[:start] + whole[start + 16 :]):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match="cannot be read as a checkpoint"):
                checkpoint.load(path)
    path.write_bytes(whole)
    assert checkpoint.load(path)["step"] == 1


def test_a_damaged_newest_checkpoint_is_named_and_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2):
        path = checkpoint.save(tmp_path, state_of(*trained(), step), Communicator())
    path.write_bytes(path.read_bytes()[:-1])
    assert checkpoint.load_latest(tmp_path, Communicator())[1]["step"] == 1
    warning = capsys.readouterr().err
    assert "checkpoint_00000002.pt: cannot be read" in warning and "taking checkpoint_00000001.pt" in warning


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    trace, path = tmp_path / "executed", tmp_path / "checkpoint_00000001.pt"
    state = state_of(*trained(), 1) | {"config": Malicious(trace)}
    torch.save(state, path)
    seal(path)
    with pytest.raises(UserError, match="cannot be read as a checkpoint, damaged or not one: Weights only"):
        checkpoint.load(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)  # the test itself is sharp
    assert trace.exists()


def test_another_file_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint here"):
        checkpoint.load_latest(tmp_path, Communicator())
    with pytest.raises(UserError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "none.pt")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    seal(tmp_path / "other.pt")
    with pytest.raises(UserError, match="not a checkpoint of ddpatch"):
        checkpoint.load(tmp_path / "other.pt")


def test_another_models_weights_are_refused_by_name_and_shape() -> None:
    model, _ = trained(width=6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = trained(width=7)[0].state_dict()
    with pytest.raises(UserError, match=r"a\.pt: checkpoint of another model: .*'0\.weight' has shape \[7, 4\].*\[6, 4\]"):
        checkpoint.restore_weights(model, weights, "a.pt")
    missing = {name: tensor for name, tensor in before.items() if name != "2.bias"}
    with pytest.raises(UserError, match=r"'2\.bias' of this model, of shape \[2\], is missing"):
        checkpoint.restore_weights(model, missing, "a.pt")
    with pytest.raises(UserError, match=r"'3\.weight', of shape \[5\], is not part of this model"):
        checkpoint.restore_weights(model, before | {"3.weight": torch.zeros(5)}, "a.pt")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
