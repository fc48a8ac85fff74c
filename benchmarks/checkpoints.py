"""What a checkpoint costs that is written in the background while the training goes on.

    python benchmarks/checkpoints.py        # about 5 minutes on two cores; needs them to itself

The cost of a checkpoint is the time in which ranks hand over their state, and what the steps that its writing overlaps take
longer than the median step without one, added up. Once a minute, that has to be at most 2 % of the time. What ranks tell each
other after every step, so that all of them leave together, has to be one reduction of at most 8 bytes. The report goes to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from hardware import describe
from launch import launch
from problem import open_training
from reports import RESULTS, command, listed, met, stem, table, write_rows

from ddpatch.io.checkpoint import CheckpointWriter
from ddpatch.model.two_level import count_parameters
from ddpatch.parallel.comm import Communicator, guard
from ddpatch.training import Training

INTERVAL, MOST = 60.0, 0.02  # seconds between checkpoints, and their share of the time
FLAGS = "union"  # kind of communication

Row = dict[str, Any]


def work(args: argparse.Namespace, comm: Communicator) -> None:
    """Measure on these ranks, and print the rows. Collective."""
    grid, patch = (args.points,) * 3, (args.points // 2,) * 3
    with open_training(args.worker, grid, patch, {"channels": args.channels}, comm) as training:
        training.advance()
        rows = write_checkpoints(training, args.worker, args.checkpoints, args.steps)
    if comm.rank == 0:
        print(json.dumps(rows))


def write_checkpoints(training: Training, folder: Path, count: int, steps: int) -> list[Row]:
    """Write checkpoints one after the other, with some steps before each that no writing overlaps. Collective."""
    comm, rows = training.comm, []
    usual: list[float] = []
    with CheckpointWriter(folder, comm) as writer:
        for _ in range(count):
            calls, sent = comm.calls[FLAGS], comm.bytes[FLAGS]
            usual += [max(clock(training.advance, comm)) for _ in range(steps)]
            flags = {"flag_calls": (comm.calls[FLAGS] - calls) / steps, "flag_bytes": (comm.bytes[FLAGS] - sent) / steps}
            handing = clock(lambda: writer.save(training.state()), comm)
            path = folder / f"checkpoint_{training.step:08d}.pt"
            slowed = []
            while comm.broadcast(not path.exists()):
                slowed.append(max(clock(training.advance, comm)))
            rows.append({"save_by_rank": handing, "slowed": slowed, "bytes": path.stat().st_size, **flags})
    ranks, parameters, step = comm.size, count_parameters(training.model), statistics.median(usual)
    return [{"ranks": ranks, "parameters": parameters, "step": step, **add_cost(row, step)} for row in rows]


def clock(action: Callable[[], object], comm: Communicator) -> list[float]:
    """Seconds of an action on every rank. Collective."""
    comm.barrier()
    start = time.perf_counter()
    action()
    return comm.gather(time.perf_counter() - start)


def add_cost(row: Row, step: float) -> Row:
    """The cost of a checkpoint in seconds: handing over, and the excess of the steps over the usual one."""
    excess = sum(row["slowed"]) - step * len(row["slowed"])
    return {**row, "slowed": len(row["slowed"]), "excess": excess, "cost": max(row["save_by_rank"]) + excess}


def report(rows: list[Row], args: argparse.Namespace) -> str:
    """The Markdown page."""
    groups = [[row for row in rows if row["ranks"] == ranks] for ranks in dict.fromkeys(row["ranks"] for row in rows)]
    header = ("ranks", "MB", "s per step", "s in save, by rank", "steps overlapped", "s slowed", "s in all", "all of them")
    lines = [
        f"# Checkpoints in the background, {date.today()}",
        "",
        f"{describe()}. `{command()}`",
        "",
        f"U-Net {'-'.join(map(str, args.channels))}, {rows[0]['parameters'] / 1e6:.1f} M parameters, their averages and moments;",
        f"{args.points}³ points, 8 patches. Medians over {args.rounds} launches of {args.checkpoints} checkpoints each.",
        "",
        *table(header, [cells(group) for group in groups]),
        *table(("bar", "found", "met"), [bar for group in groups for bar in bars(group)]),
    ]
    return "\n".join(lines)


def cells(group: list[Row]) -> list[str]:
    """The line of one number of ranks."""
    middle = {key: statistics.median(row[key] for row in group) for key in ("step", "slowed", "excess", "cost")}
    saving = [statistics.median(times) for times in zip(*(row["save_by_rank"] for row in group), strict=True)]
    seconds = [f"{middle['step']:.3f}", listed(saving), f"{middle['slowed']:g}", f"{middle['excess']:.3f}"]
    size = f"{group[0]['bytes'] / 1e6:.0f}"
    return [str(group[0]["ranks"]), size, *seconds, f"{middle['cost']:.3f}", listed([row["cost"] for row in group])]


def bars(group: list[Row]) -> list[tuple[str, str, str]]:
    """What a checkpoint, and the flags of a step, may cost."""
    ranks = f"{group[0]['ranks']} rank{'s' * (group[0]['ranks'] > 1)}"
    share = statistics.median(row["cost"] for row in group) / INTERVAL
    calls, sent = (max(row[key] for row in group) for key in ("flag_calls", "flag_bytes"))
    return [
        (f"{ranks}: at most {MOST:.0%} of the time, with a checkpoint a minute", f"{share:.2%}", met(share <= MOST)),
        (f"{ranks}: flags of a step, at most 1 call of 8 bytes", f"{calls:g} of {sent:g}", met(calls <= 1 and sent <= 8)),
    ]


def run(args: argparse.Namespace) -> None:
    """Let the numbers of ranks take turns, and write the report."""
    rows: list[Row] = []
    args.folder.mkdir(parents=True, exist_ok=True)
    for i in range(args.rounds):
        for ranks in args.ranks:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                printed = launch(ranks, __file__, *sys.argv[1:], "--worker", folder)
            rows += [{"round": i, **row} for row in json.loads(printed.splitlines()[-1])]
            print(*rows[-args.checkpoints :], sep="\n", flush=True)
    path = stem("checkpoints", args.output)
    write_rows(path.with_suffix(".csv"), rows)
    text = report(rows, args)
    path.with_suffix(".md").write_text(text)
    print(text)


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks (default 1 2)")
    parser.add_argument("--points", type=int, default=32, help="per axis of the grid, in 8 patches (default %(default)s)")
    parser.add_argument("--channels", type=int, nargs="+", default=[48, 96, 192], help="of the U-Net (default 48 96 192)")
    parser.add_argument("--checkpoints", type=int, default=5, help="of a launch (default %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="before every checkpoint, without one (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="launches with every number of ranks (default %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="for the checkpoints (default %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the report (default benchmarks/results)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        sys.exit(guard(lambda comm: work(args, comm)))
    run(args)


if __name__ == "__main__":
    main()
