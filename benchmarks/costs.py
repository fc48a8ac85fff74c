"""A cost model of a training step: fitted, checked against runs that it has not seen, and used for machines that are not here.

    python benchmarks/costs.py        # about 8 minutes on two cores; needs them to itself

    t = c + F / r + α n + b / β

F: operations of a rank, n: calls that wait for other ranks, b: bytes that reach it, all three from a rehearsal of the step
(ddpatch/rehearsal.py), for any number of ranks. The constant c and the rate r are fitted to steps on one rank, α and β to gathers
between two ranks, and steps on two ranks, and other volumes, are predicted. The report goes to benchmarks/results/.

Then the step of a volume of 2048³ points on up to 4096 GPUs, from an assumed rate (ddpatch/machine.py), latency and bandwidth:
what is said there is the model, not a measurement. The coarse level is a line of its own, replicated, sharded, and sharded with
tokens that attend to means of tokens (`model.coarse_keys`).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from costs_page import COARSE, plot, report
from launch import launch
from problem import open_training
from reports import stem, write_rows
from timing import WARM_UP, measure

from ddpatch.config import build
from ddpatch.io.volume import VolumeHeader
from ddpatch.machine import GPUS, SHARE
from ddpatch.parallel.comm import Communicator, guard
from ddpatch.rehearsal import Cost, rehearse

PATCH = 32
FITTED = (((64, 32, 32), 1), ((64, 64, 64), 1), ((64, 64, 96), 1), ((128, 64, 64), 1))  # points per axis, ranks
HELD_OUT = (((64, 64, 32), 1), ((96, 64, 64), 2), ((64, 64, 64), 2), ((128, 64, 64), 2), ((128, 96, 64), 2))
SIZES = tuple(2**n for n in range(3, 25, 3))  # bytes of a gather
WHOLE, GPU_PATCH, GPUS_USED = 2048, 128, tuple(2**n for n in range(13))
GPU, LATENCY, BANDWIDTH = "h200", 20e-6, 25e9  # seconds of a call, and bytes per second of a GPU: assumed
ABOUT = (
    f"Assumed: {SHARE:.0%} of the published float32 peak of an {GPU}, {LATENCY * 1e6:.0f} µs a call and level of a tree, "
    f"{BANDWIDTH / 1e9:.0f} GB/s a GPU; {WHOLE}³ points, patches of {GPU_PATCH}³, {(WHOLE // GPU_PATCH) ** 3 * 64} tokens. "
    "Seconds of a step, of its fine level and of its coarse level, replicated, sharded, and sharded with 2³ keys a patch, not "
    "of 4³, communication beside it."
)
Row = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """The cost model.

    Attributes:
        constant: c, seconds.
        rate: r, operations per second.
        latency: α, seconds per call.
        bandwidth: β, bytes per second.
    """

    constant: float
    rate: float
    latency: float
    bandwidth: float

    def seconds(self, cost: Cost, ranks: int) -> float:
        """t of a step of a rank."""
        return self.constant + cost.flops / self.rate + self.communication(cost, ranks)

    def communication(self, cost: Cost, ranks: int) -> float:
        """Seconds of communication; the latency grows with the depth of a tree over the ranks."""
        if ranks == 1:
            return 0.0
        return self.latency * math.log2(ranks) * cost.calls.total() + moved(cost, ranks) / self.bandwidth


def moved(cost: Cost, ranks: int) -> float:
    """Bytes that reach a rank: what others send of a gather, and twice a sum of gradients."""
    sent = cost.sent
    return sent["halo"] + (sent["allgather"] * ranks + sent["reduce_scatter"] + 2 * sent["allreduce"]) * (ranks - 1) / ranks


def cost_of(grid: Sequence[int], patch: int, ranks: int, coarse: str = "auto", keys: int | None = None) -> Cost:
    """A training step with the default network but for its keys, of a rank with the most patches."""
    tree = {
        "domain": {"patch": [patch] * 3, "grid": list(grid), "periodic": [True] * 3},
        "data": {"path": "none"},
        "model": {"coarse_keys": keys},
        "train": {"batch": 1},
        "parallel": {"device": "cpu"},
        "execution": {"coarse": coarse},
    }
    return rehearse(build(tree, "benchmark"), VolumeHeader(1, ("u", "v", "w"), tuple(grid), (1.0,) * 3, (True,) * 3), ranks).step


def time_step(grid: Sequence[int], comm: Communicator, folder: Path, steps: int) -> float:
    """Median seconds of a training step. Collective."""
    with open_training(folder, grid, (PATCH,) * 3, {}, comm) as training:
        return measure(training.advance, training, steps)["total"]


def time_gathers(comm: Communicator, times: int = 20) -> list[tuple[int, float]]:
    """Bytes, and median seconds of a gather of as many from every rank. Collective."""
    found = []
    for size in SIZES:
        rows, seconds = torch.zeros(1, size, dtype=torch.uint8), []
        for _ in range(times):
            comm.barrier()
            start = time.perf_counter()
            comm.allgather(rows, [1] * comm.size)
            seconds.append(time.perf_counter() - start)
        found.append((size, statistics.median(seconds)))
    return found


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """a and b of y = a + x / b, by least squares of relative errors; a is not negative."""
    x, y = np.array(points).T
    (a, slope), *_ = np.linalg.lstsq(np.stack([1 / y, x / y], axis=1), np.ones(len(y)), rcond=None)
    if a < 0:
        a, slope = 0.0, float((x / y).sum() / np.square(x / y).sum())
    return float(a), 1 / float(slope)


def predict_gpus() -> list[Row]:
    """Seconds of a step of a large volume by number of GPUs, and of its coarse level in all ways."""
    rate = SHARE * GPUS[GPU].single
    model = Model(0.0, rate, LATENCY, BANDWIDTH)
    patches = (WHOLE // GPU_PATCH) ** 3
    grid, rows = (WHOLE,) * 3, []
    alone = {name: cost_of(grid, GPU_PATCH, patches, *way) for name, way in COARSE.items()}
    pairs = {name: cost_of(grid, GPU_PATCH, patches // 2, *way) for name, way in COARSE.items()}
    fine = pairs["replicated"].flops - alone["replicated"].flops  # of one patch more
    for ranks in GPUS_USED:
        own = patches // ranks
        row: Row = {"gpus": ranks, "fine": own * fine / rate}
        for coarse in alone:
            here, slope = alone[coarse], pairs[coarse].flops - alone[coarse].flops
            level = here.flops - fine + (own - 1) * (slope - fine)
            row[coarse] = level / rate
            row[f"{coarse}_sent"] = model.communication(here, ranks)
            row[f"{coarse}_total"] = own * fine / rate + row[coarse] + row[f"{coarse}_sent"]
        rows.append(row)
    for row in rows:
        for coarse in alone:
            row[f"{coarse}_efficiency"] = rows[0][f"{coarse}_total"] / row[f"{coarse}_total"] / row["gpus"]
    return rows


def run(steps: int) -> None:
    """Measure, fit, predict, and write the report."""

    def launched(ranks: int, *what: str) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            return json.loads(launch(ranks, __file__, "--steps", str(steps), "--worker", folder, *what).splitlines()[-1])

    path, rows = stem("costs"), []
    gathers = launched(2, "gathers")
    for grid, ranks in (*FITTED, *HELD_OUT):
        measured = launched(ranks, json.dumps(grid))
        rows.append({"grid": "×".join(map(str, grid)), "ranks": ranks, "fitted": (grid, ranks) in FITTED, "measured": measured})
        rows[-1]["cost"] = cost_of(grid, PATCH, ranks)
        print({key: value for key, value in rows[-1].items() if key != "cost"}, flush=True)
    constant, rate = fit([(row["cost"].flops, row["measured"]) for row in rows if row["fitted"]])
    model = Model(constant, rate, *fit(gathers))
    for row in rows:
        row["predicted"] = model.seconds(row.pop("cost"), row["ranks"])
    gpus = predict_gpus()
    write_rows(path.with_suffix(".csv"), rows)
    plot(gpus, path.with_suffix(".png"))
    text = report(asdict(model), rows, gpus, ABOUT, path.with_suffix(".png").name)
    path.with_suffix(".md").write_text(text)
    print(text)


def work(args: argparse.Namespace) -> Callable[[Communicator], None]:
    """What a rank does."""
    folder, what = args.worker

    def action(comm: Communicator) -> None:
        found: Any = (
            time_gathers(comm) if what == "gathers" else time_step(tuple(json.loads(what)), comm, Path(folder), args.steps)
        )
        if comm.rank == 0:
            print(json.dumps(found))

    return action


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help=f"timed steps, after {WARM_UP} that are not (default %(default)s)")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        sys.exit(guard(work(args)))
    run(args.steps)


if __name__ == "__main__":
    main()
