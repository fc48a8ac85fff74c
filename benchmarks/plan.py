"""Whether ``ddpatch plan`` knows how much memory a training takes: predicted beside measured, for several configurations.

    python benchmarks/plan.py        # minutes on two cores; memory only, so that it may run beside other work

Every case is planned in a process of its own, and runs two training steps on white noise in others. Measured is the high-water
mark of resident memory (VmHWM) in these steps, the largest of any rank. The C library of Linux keeps memory that was freed, and
cuts it into pieces that it cannot always use again; how much that is follows from nothing that is known before, and the plan
takes a half of the arrays for it. So cases run twice: as they are, and with ``MALLOC_MMAP_THRESHOLD_``, which makes it give
arrays back when they are freed, beside a plan without that half. A case that is in the table of the day is not run again. The
report goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hardware import describe
from launch import launch
from reports import RESULTS, command, met, stem, table, write_rows

from ddpatch.config import Config, build
from ddpatch.data.fields import FieldFile
from ddpatch.io.volume import VolumeHeader, write_volume
from ddpatch.machine import Device, process_memory, spare_share
from ddpatch.parallel.comm import Communicator
from ddpatch.plan import make_plan
from ddpatch.run import measure_field, resolve
from ddpatch.training import Training

CHANNELS, MOST = ("u", "v", "w"), 0.15
MEMORY = ("predicted", "measured", "without", "returning")
PAIRS = {"as it is": ("predicted", "measured"), "returning": ("without", "returning")}
RETURNING = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A training on a cube or square of ``grid`` points per axis."""

    axes: int
    grid: int
    patch: int
    widths: tuple[int, ...]
    ranks: int = 1
    at_once: int | None = None
    batch: int = 1
    optimiser: str = "muon"
    tokens: int = 4

    def config(self, data: Path) -> Config:
        """The configuration of its run."""
        tree = {
            "domain": {"patch": [self.patch] * self.axes},
            "data": {"path": str(data)},
            "model": {"channels": self.widths, "tokens": self.tokens},
            "train": {"batch": self.batch, "optimiser": self.optimiser},
            "execution": {"patches_at_once": self.at_once},
        }
        return build(tree, "benchmark")


CASES = [
    Case(3, 32, 16, (32, 64, 128)),
    Case(3, 32, 16, (32, 64), at_once=1),
    Case(3, 32, 16, (32, 64, 128), ranks=2, optimiser="adam"),
    Case(3, 48, 16, (16, 32), at_once=3, batch=2, tokens=2),
    Case(3, 64, 32, (16, 32), ranks=2, at_once=1, optimiser="adam"),
    Case(2, 128, 32, (32, 64, 128), batch=4),
    Case(2, 256, 64, (32, 64), at_once=4, batch=2, optimiser="adam", tokens=2),
    Case(2, 512, 64, (16, 32), ranks=2, at_once=8, tokens=2),
    Case(3, 64, 32, (32, 64, 128)),
    Case(3, 96, 32, (32, 64, 128), at_once=4),
]


def measure(case: Case, folder: Path, comm: Communicator) -> float:
    """High-water mark of resident memory in two training steps, the largest of any rank, in bytes. Collective."""
    with FieldFile(folder / "data.h5") as file:
        config = resolve(case.config(folder / "data.h5"), file)
        training = Training(config, file, measure_field(config, file, comm), comm)
        Path("/proc/self/clear_refs").write_text("5")  # the mark begins anew from what is resident now
        for _ in range(2):
            training.advance()
    lines = Path("/proc/self/status").read_text().splitlines()
    return max(comm.gather(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024.0))


def predict(case: Case, folder: Path, comm: Communicator) -> float:
    """What the plan says, in bytes, of memory that is kept as the environment says."""
    with FieldFile(folder / "data.h5") as file:
        config = resolve(case.config(folder / "data.h5"), file)
        device = Device("cpu", 1.0, 1.0, process_memory(config, comm), spare_share(torch.device("cpu")), "not measured")
        return float(make_plan(config, file.header, case.ranks, device).memory)


def run(number: int) -> Row:
    """Predict and measure one case."""
    case = CASES[number]
    with tempfile.TemporaryDirectory() as name:
        folder, shape = Path(name), (case.grid,) * case.axes
        header = VolumeHeader(case.batch, CHANNELS, shape, (1.0,) * case.axes, (True,) * case.axes)
        draw = np.random.default_rng(0)
        write_volume(
            folder / "data.h5", header, (draw.standard_normal((len(CHANNELS), *shape), np.float32) for _ in range(case.batch))
        )
        found = {"predicted": work("predict", number, folder, 1), "measured": work("measure", number, folder, case.ranks)}
        os.environ.update(RETURNING)
        found |= {"without": work("predict", number, folder, 1), "returning": work("measure", number, folder, case.ranks)}
        for key in RETURNING:
            del os.environ[key]
    return {**asdict(case), "widths": "-".join(map(str, case.widths)), **found}


def work(what: str, number: int, folder: Path, ranks: int) -> float:
    """Let new processes predict or measure."""
    return float(json.loads(launch(ranks, __file__, "--worker", what, str(number), str(folder)).splitlines()[-1]))


def read_rows(path: Path) -> list[Row]:
    """The rows of the day: of the first cases, none where there is no table yet."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{**row, "axes": int(row["axes"]), **{key: float(row[key]) for key in MEMORY}} for row in csv.DictReader(file)]


def report(rows: list[Row]) -> str:
    """The Markdown page."""
    ratios = {name: [row[a] / row[b] for row in rows] for name, (a, b) in PAIRS.items()}
    header = ("grid", "patch", "widths", "ranks", "patches at once", "batch", "optimiser")
    figures = ("predicted, MB", "measured, MB", "ratio", "predicted, returning", "measured, returning", "ratio")
    lines = [
        f"# Memory of a rank, as planned and as measured, {date.today()}",
        "",
        f"{describe()}, {os.confstr('CS_GNU_LIBC_VERSION')}. `{command()}`",
        "",
        "Measured: high-water mark of resident memory in two training steps; returning: with "
        f"`{' '.join(f'{key}={value}' for key, value in RETURNING.items())}`.",
        "",
        *table((*header, *figures), [cells(row) for row in rows]),
        *table(
            ("bar", "found", "met"),
            [
                (
                    f"within {MOST:.0%}, {name}",
                    f"{min(found):.3f} to {max(found):.3f}",
                    met(all(abs(r - 1) <= MOST for r in found)),
                )
                for name, found in ratios.items()
            ],
        ),
    ]
    return "\n".join(lines)


def cells(row: Row) -> list[str]:
    """The line of one case."""
    figures = [
        text for a, b in PAIRS.values() for text in (f"{row[a] / 1e6:.0f}", f"{row[b] / 1e6:.0f}", f"{row[a] / row[b]:.3f}")
    ]
    grid, patch = (f"{row[key]}{'²³'[row['axes'] - 2]}" for key in ("grid", "patch"))
    facts = [grid, patch, row["widths"], str(row["ranks"]), str(row["at_once"] or "all"), str(row["batch"]), row["optimiser"]]
    return [*facts, *figures]


def main() -> None:
    """Run the cases and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the report (default benchmarks/results)")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        comm, (what, number, folder) = Communicator(), args.worker
        found = (predict if what == "predict" else measure)(CASES[int(number)], Path(folder), comm)
        if comm.rank == 0:
            print(json.dumps(found))
        sys.exit()
    path = stem("plan", args.output)
    rows = read_rows(path.with_suffix(".csv"))
    for number in range(len(rows), len(CASES)):
        rows.append(run(number))
        print(rows[-1], flush=True)
        write_rows(path.with_suffix(".csv"), rows)
    text = report(rows)
    path.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
