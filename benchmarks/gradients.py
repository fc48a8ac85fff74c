"""Does it pay to sum gradients during the backward pass?

    python benchmarks/gradients.py        # about 3 minutes on two cores; needs them to itself

Three ways: buckets whose sums begin in the backward pass; one bucket with everything, whose sum begins after it; no sum over
ranks at all, as the lower bound. The ways take turns from step to step. The report goes to benchmarks/results/.
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
from reports import RESULTS, command, met, stem, table, write_rows

from ddpatch.model.two_level import count_parameters
from ddpatch.parallel.comm import Communicator, guard
from ddpatch.parallel.gradients import BUCKET_BYTES, GradientSum
from ddpatch.training import Training

OVERLAPPED, AFTERWARDS, NONE = "buckets, during the backward pass", "one bucket, after it", "no sum"

Row = dict[str, Any]


class TimedSum(GradientSum):
    """Knows the seconds that it was waited for."""

    seconds = 0.0

    def finish(self) -> None:
        """As :meth:`GradientSum.finish`. Collective."""
        start = time.perf_counter()
        super().finish()
        self.seconds = time.perf_counter() - start


def work(args: argparse.Namespace, comm: Communicator) -> None:
    """Let the ways take turns on these ranks, and print the rows. Collective."""
    grid, patch, alone = (args.points,) * 3, (args.points // 2,) * 3, comm.split(comm.rank)
    with open_training(args.worker, grid, patch, {"channels": args.channels}, comm) as training:
        weights = list(training.model.parameters())
        ways: dict[str, Callable[[], TimedSum]] = {
            OVERLAPPED: lambda: TimedSum(weights, comm),
            AFTERWARDS: lambda: TimedSum(weights, comm, sum(w.nbytes for w in weights)),
            NONE: lambda: TimedSum(weights, alone),
        }
        training.advance()
        rows = [{"step": i, "way": way, **step(training, make)} for i in range(args.steps) for way, make in ways.items()]
    facts = {"parameters": count_parameters(training.model), "bytes": sum(w.nbytes for w in weights)}
    if comm.rank == 0:
        print(json.dumps([{**facts, **row} for row in rows]))


def step(training: Training, make: Callable[[], TimedSum]) -> Row:
    """Seconds of a step with another sum of gradients, and of waiting for it, on the slowest rank. Collective."""
    training.gradients.release()
    training.gradients = found = make()
    training.comm.barrier()
    start = time.perf_counter()
    training.advance()
    seconds = training.comm.gather((time.perf_counter() - start, found.seconds))
    return {"seconds": max(s for s, _ in seconds), "waited": max(w for _, w in seconds)}


def report(rows: list[Row], args: argparse.Namespace) -> str:
    """The Markdown page."""
    steps = [{row["way"]: row for row in rows if row["step"] == i} for i in range(args.steps)]
    ratios = {way: [found[way]["seconds"] / found[NONE]["seconds"] for found in steps] for way in (OVERLAPPED, AFTERWARDS, NONE)}
    gain = [found[AFTERWARDS]["seconds"] / found[OVERLAPPED]["seconds"] for found in steps]
    lines = [
        f"# The sum of gradients, {date.today()}",
        "",
        f"{describe()}. `{command()}`",
        "",
        f"{args.ranks} ranks; {args.points}³ points, 8 patches; U-Net {'-'.join(map(str, args.channels))},",
        f"{rows[0]['parameters']} parameters, {rows[0]['bytes'] / 1e6:.1f} MB of gradients; buckets of {BUCKET_BYTES >> 20} MiB.",
        f"{args.steps} steps with each of the ways, which took turns; seconds of the slowest rank, median and range.",
        "",
        *table(
            ("sum", "s per step", "s waiting for the sum", "step, relative to no sum"),
            [
                [way, *(spread([found[way][key] for found in steps]) for key in ("seconds", "waited")), spread(ratios[way])]
                for way in ratios
            ],
        ),
        f"One bucket afterwards takes {spread(gain)} × the step of buckets during the backward pass;",
        f"that the overlap pays, by the median: {met(statistics.median(gain) > 1)}.",
    ]
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    """Launch the ranks and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="default %(default)s")
    parser.add_argument("--points", type=int, default=64, help="per axis of the grid, in 8 patches (default %(default)s)")
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64, 128], help="of the U-Net (default 32 64 128)")
    parser.add_argument("--steps", type=int, default=15, help="with each of the ways (default %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="for data, seen by all ranks (default %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the report (default benchmarks/results)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        sys.exit(guard(lambda comm: work(args, comm)))
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows = json.loads(launch(args.ranks, __file__, *sys.argv[1:], "--worker", folder).splitlines()[-1])
    path, text = stem("gradients", args.output), report(rows, args)
    write_rows(path.with_suffix(".csv"), rows)
    path.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
