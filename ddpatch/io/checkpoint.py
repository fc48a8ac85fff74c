"""Checkpoints: the state of a training run in one file, which holds tensors and plain values only and runs no code when read."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpatch.errors import UserError
from ddpatch.io.seal import check_seal, seal
from ddpatch.io.volume import replace_when_complete
from ddpatch.parallel.comm import Communicator

KEYS = ("config", "model", "ema", "optimiser", "step", "samples_seen", "statistics")


class CheckpointWriter:
    """Writes ``checkpoint_<step>.pt`` on rank 0, in the background: ranks wait only while rank 0 copies the state.

    A file is complete, on the disk and proven readable before it gets its name, and ``latest`` is a link to it after that: a
    failure leaves the earlier checkpoints. A failure in the background is raised on all ranks by the next call. On leaving its
    context a writer waits for its file.

    Arguments:
        folder: The folder of the run.
        comm: All ranks; they hold the same state.
        keep_last: Number of checkpoints to keep, at least 1.
        keep_every: Checkpoints of multiples of so many steps are kept besides.
    """

    def __init__(self, folder: str | Path, comm: Communicator, keep_last: int = 2, keep_every: int | None = None) -> None:
        self.folder, self.comm, self.keep_last, self.keep_every = Path(folder), comm, keep_last, keep_every
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self._thread:
            self._thread.join()

    def save(self, state: Mapping[str, Any]) -> Path:
        """Begin to write a checkpoint, when the one before is written. Collective.

        Arguments:
            state: Values by the names in :data:`KEYS`: ``config`` (nested plain values), ``model`` and ``ema`` (weights),
                ``optimiser`` (its state), ``step`` and ``samples_seen`` (integers), ``statistics`` (floats, lists or tensors).

        Returns:
            The path that the checkpoint will have.

        Raises:
            UserError: on all ranks, if the checkpoint before could not be written.
            ValueError: if the names are not those in :data:`KEYS`.
        """
        if set(state) != set(KEYS):
            raise ValueError(f"a checkpoint has {sorted(KEYS)}, got {sorted(state)}")
        self.wait()
        path = self.folder / f"checkpoint_{state['step']:08d}.pt"
        if self.comm.rank == 0:
            self._thread = threading.Thread(target=self._write, args=(path, _copy(dict(state))))
            self._thread.start()
        return path

    def wait(self) -> None:
        """Wait until the last checkpoint is written. Collective.

        Raises:
            UserError: on all ranks, if it could not be written.
        """
        self.comm.on_root(self._join)

    def _join(self) -> None:
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._failure:
            failure, self._failure = self._failure, None
            raise failure

    def _write(self, path: Path, state: dict[str, Any]) -> None:
        try:
            _write(path, state)
            self._tidy(path)
        except (OSError, RuntimeError) as error:
            self._failure = UserError(f"{path}: cannot write the checkpoint: {' '.join(str(error).split())}")
        except Exception as error:  # to be raised where a traceback is seen
            self._failure = error

    def _tidy(self, path: Path) -> None:
        link = self.folder / f"latest.{os.getpid()}"
        link.unlink(missing_ok=True)
        link.symlink_to(path.name)
        link.replace(self.folder / "latest")
        earlier = [other for other in find_all(self.folder) if _step(other) < _step(path)]
        for old in earlier[: max(0, len(earlier) - (self.keep_last - 1))]:
            if not self.keep_every or _step(old) % self.keep_every:
                old.unlink()


def save(folder: str | Path, state: Mapping[str, Any], comm: Communicator, keep_last: int = 2) -> Path:
    """Write a checkpoint and wait for it. Collective; see :class:`CheckpointWriter`."""
    with CheckpointWriter(folder, comm, keep_last) as writer:
        return writer.save(state)


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
        check_seal(Path(path))
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


def _write(path: Path, state: dict[str, Any]) -> None:
    with replace_when_complete(path, overwrite=True) as temporary:
        with temporary.open("wb") as file:
            torch.save(state, file)
        torch.load(temporary, map_location="cpu", weights_only=True, mmap=True)
        seal(temporary)


def _copy(value: Any) -> Any:
    """Nested values with tensors of their own in host memory, which training does not change any more."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy(item) for item in value)
    return value


def _step(path: Path) -> int:
    number = re.search(r"(\d+)\.pt$", path.name)
    return int(number[1]) if number else -1
