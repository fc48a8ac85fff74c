"""The log of a training run: rows of means, written by rank 0."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ddpatch.errors import UserError
from ddpatch.io.volume import replace_when_complete

if TYPE_CHECKING:
    from ddpatch.training import Training

Progress = Callable[[dict[str, Any]], None]


class Log:
    """The rows of log.jsonl, written by rank 0: means over the steps since the row before.

    ``calls_per_step`` are those of this rank, by kind of communication, ``bytes_per_step`` what the rank sends that sends most.
    """

    def __init__(self, path: Path, training: Training, progress: Progress) -> None:
        self.training, self.progress = training, progress
        self._path = path if training.comm.rank == 0 else None
        self._board = _tensorboard(path.parent) if self._path else None
        self._reset()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self._board:
            self._board.close()

    def add(self, loss: float) -> None:
        """Take in the loss of one step, NaN where it was skipped."""
        self._losses.append(loss)

    def write(self) -> None:
        """Write a row and begin anew. Collective."""
        training, wall, steps = self.training, time.perf_counter() - self._start, len(self._losses)
        comm, points = training.comm, training.decomposition.num_points * training.config.train.batch * steps
        calls, sent = training.grid.calls - self._calls, comm.gather(training.grid.bytes - self._bytes)
        local = torch.tensor(
            [
                training.grid.seconds - self._comm_seconds,
                training.batches.seconds - self._io_seconds,
                peak_memory(training.device),
            ],
            dtype=torch.float64,
        )
        ranks = comm.allgather(local[None], [1] * comm.size)
        row = {
            "step": training.step,
            "samples_seen": training.samples_seen,
            "loss": mean_of_finite(self._losses),
            "skipped": training.skipped,
            "voxels_per_rank_second": points / wall / comm.size,
            "communication": float(ranks[:, 0].mean()) / wall,
            "calls_per_step": {kind: number / steps for kind, number in calls.items()},
            "bytes_per_step": {kind: max(rank[kind] for rank in sent) / steps for kind in calls},
            "input": float(ranks[:, 1].mean()) / wall,
            "peak_memory_gib": float(ranks[:, 2].max()) / 2**30,
            "seconds": wall,
        }
        if self._path:
            _append(self._path, json.dumps(row) + "\n")
            if self._board:
                for key in ("loss", "voxels_per_rank_second"):
                    if row[key] is not None:
                        self._board.add_scalar(key, row[key], training.step)
            self.progress(row)
        self._reset()

    def _reset(self) -> None:
        self._losses: list[float] = []
        self._start = time.perf_counter()
        self._calls, self._bytes = self.training.grid.calls, self.training.grid.bytes
        self._comm_seconds, self._io_seconds = self.training.grid.seconds, self.training.batches.seconds


def forget_rows(path: Path, step: int) -> None:
    """Remove the rows of steps after ``step``, which a run that goes on from there makes again, and a row that was cut."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if len(kept) < len(lines):
        with replace_when_complete(path, overwrite=True) as temporary:
            temporary.write_text("".join(kept))


def _append(path: Path, line: str) -> None:
    try:
        with path.open("a") as file:
            file.write(line)
    except OSError as error:
        raise UserError(f"{path}: cannot write the log: {error.strerror}") from None


def mean_of_finite(values: list[float]) -> float | None:
    """The mean of those that are finite, ``None`` if none is."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def peak_memory(device: torch.device) -> float:
    """Largest memory so far in bytes: of the device's allocator, or of this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))
