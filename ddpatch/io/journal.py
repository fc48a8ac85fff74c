"""What an unfinished file of samples holds already: a line that says which series it is, then one for every commit."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ddpatch.io.volume import sync


class Journal:
    """The journal of one unfinished file. It is written after the samples are on the disk, so that it never promises too much.

    Arguments:
        path: Where it is.
        series: Plain values by name; a series goes on only if they are equal.
    """

    def __init__(self, path: Path, series: dict[str, Any]) -> None:
        self.path, self.series = path, json.loads(json.dumps(series, default=_plain))

    def difference(self) -> str:
        """What tells the series that was begun from this one, ``name = value, now value``; empty where nothing does."""
        begun = self._lines()[0] if self._lines() else self.series
        names = [name for name in {**begun, **self.series} if begun.get(name) != self.series.get(name)]
        return f"{names[0]} = {_short(begun.get(names[0]))}, now {_short(self.series.get(names[0]))}" if names else ""

    def finished(self) -> set[int]:
        """The samples that are on the disk."""
        return {sample for line in self._lines()[1:] for sample in line}

    def begin(self) -> None:
        """Write the line of the series."""
        self.path.write_text(json.dumps(self.series) + "\n")
        sync(self.path.parent)

    def add(self, samples: Iterable[int]) -> None:
        """Note that samples are on the disk."""
        with self.path.open("a") as file:
            file.write(json.dumps(sorted(samples)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Forget everything."""
        self.path.unlink(missing_ok=True)

    def _lines(self) -> list[Any]:
        """The complete lines: a failure may have cut the last one."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
