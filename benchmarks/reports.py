"""What reports share: their name, the command that made them, their rows, and words for verdicts."""

from __future__ import annotations

import csv
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def stem(name: str, folder: Path = RESULTS) -> Path:
    """The path of a report of today on this machine, without its suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}_{os.uname().machine}_{date.today()}"


def command() -> str:
    """The command line of this benchmark."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A CSV file, with the keys of the first row as its header."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table, and an empty one."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(map(str, cells))} |" for cells in lines] + [""]


def listed(values: Sequence[float]) -> str:
    """Values to three places, in order."""
    return ", ".join(f"{v:.3f}" for v in values)


def met(holds: bool) -> str:
    """Yes or no."""
    return "yes" if holds else "**no**"
