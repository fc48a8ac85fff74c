"""Checkpoints: the state of a training run in one file, which holds tensors and plain values only and runs no code when read."""

from __future__ import annotations

import re
import sys
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpatch.errors import UserError
from ddpatch.io.volume import replace_when_complete
from ddpatch.parallel.comm import Communicator

KEYS = ("config", "model", "ema", "optimiser", "step", "samples_seen", "statistics")


def save(folder: str | Path, state: Mapping[str, Any], comm: Communicator, keep: int = 2) -> Path:
    """Write ``checkpoint_<step>.pt`` on rank 0, and remove all but the last ``keep`` checkpoints. Collective.

    The file is complete, on the disk and proven readable before it gets its name: a failure leaves the earlier checkpoints.

    Arguments:
        folder: The folder of the run.
        state: Values by the names in :data:`KEYS`: ``config`` (nested plain values), ``model`` and ``ema`` (weights),
            ``optimiser`` (its state), ``step`` and ``samples_seen`` (integers), ``statistics`` (floats or lists).
        comm: All ranks; they hold the same state.
        keep: Number of checkpoints to keep, at least 1.

    Returns:
        The path of the checkpoint.

    Raises:
        UserError: on all ranks, if the file cannot be written.
        ValueError: if the names are not those in :data:`KEYS`.
    """
    if set(state) != set(KEYS):
        raise ValueError(f"a checkpoint has {sorted(KEYS)}, got {sorted(state)}")
    path = Path(folder) / f"checkpoint_{state['step']:08d}.pt"
    comm.on_root(lambda: _write(path, dict(state), keep))
    return path


def load_latest(folder: str | Path, comm: Communicator) -> tuple[Path, dict[str, Any]]:
    """Read the checkpoint with the largest step of those that can be read; the others are named and left alone. Collective.

    Raises:
        UserError: on all ranks, if there is none, or none that can be read.
    """
    paths = comm.broadcast(find_all(folder))
    if not paths:
        raise UserError(f"{folder}: no checkpoint here, expected a file such as checkpoint_00000500.pt")
    problems = []
    for path in reversed(paths):
        if problem := comm.on_root(partial(_problem, path)):
            problems.append(problem)
            continue
        if comm.rank == 0 and problems:
            print(*(f"ddpatch: warning: {p}; taking {path.name}" for p in problems), sep="\n", file=sys.stderr, flush=True)
        return path, load(path)
    raise UserError(problems[0])


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint into host memory: values by the names in :data:`KEYS`.

    Raises:
        UserError: if there is no such file, or it is damaged, is no checkpoint, or holds anything but tensors and plain values.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not compare the checksums that it writes
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever its bytes happen to mean
        reason = str(error).strip().split("\n")[0].split(". ")[0]
        raise UserError(f"{path}: cannot be read as a checkpoint, damaged or not one: {reason or type(error).__name__}") from None
    if not isinstance(state, dict) or set(state) != set(KEYS):
        raise UserError(f"{path}: not a checkpoint of ddpatch, expected the entries {', '.join(KEYS)}")
    return state


def find_all(folder: str | Path) -> list[Path]:
    """The checkpoints in a folder, by step."""
    return sorted(Path(folder).glob("checkpoint_*.pt"), key=_step)


def restore_weights(module: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Load the weights of a checkpoint into a module of the same architecture.

    Arguments:
        module: The module.
        weights: Its weights, by name of the parameter.
        path: Where they come from, for messages.

    Raises:
        UserError: if they are another model's, naming the first parameter that is missing, unknown or of another shape.
    """
    own = module.state_dict()
    where = f"{path}: checkpoint of another model: parameter"
    for name, tensor in own.items():
        if name not in weights:
            raise UserError(f"{where} '{name}' of this model, of shape {list(tensor.shape)}, is missing")
        if weights[name].shape != tensor.shape:
            raise UserError(f"{where} '{name}' has shape {list(weights[name].shape)}, in this model {list(tensor.shape)}")
    for name, tensor in weights.items():
        if name not in own:
            raise UserError(f"{where} '{name}', of shape {list(tensor.shape)}, is not part of this model")
    module.load_state_dict(weights)


def _problem(path: Path) -> str | None:
    try:
        load(path)
    except UserError as error:
        return str(error)
    return None


def _write(path: Path, state: dict[str, Any], keep: int) -> None:
    try:
        with replace_when_complete(path, overwrite=True) as temporary:
            with temporary.open("wb") as file:
                torch.save(state, file)
            torch.load(temporary, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot write the checkpoint: {' '.join(str(error).split())}") from None
    earlier = [other for other in find_all(path.parent) if _step(other) < state["step"]]
    for old in earlier[: max(0, len(earlier) - (keep - 1))]:
        old.unlink()


def _step(path: Path) -> int:
    number = re.search(r"(\d+)\.pt$", path.name)
    return int(number[1]) if number else -1
