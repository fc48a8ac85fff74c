"""Time of one training step: patches against a monolithic U-Net of equal width, in both precisions, and two ranks against one.

    python benchmarks/step.py                          # about 20 minutes on two cores; needs them to itself
    python benchmarks/step.py --grid 128 --rounds 2    # eight times as long a round
    python benchmarks/step.py --runs monolith two-level --rounds 10    # some of the runs, more often; a report of its own

The monolith is the same encoder, bottleneck and decoder on the whole volume as one patch, without tokens and transformer, and
with zeros beyond the volume; "periodic" is the coupling "u-net", whose convolutions close on themselves as the field does,
which patches of either coupling do through their halo. Every rank has one thread. Runs alternate, so that a drift of the
machine's speed hits all alike; figures are medians, ratios are taken within a round. The share of the peak is that of the
operations of convolutions and matrix products (ddpatch/ledger.py; with those that groups repeat) per second, of those of the
faster of a product of two square matrices and a convolution of many channels in the same type, measured in between: the
libraries of both do not use the same instructions on every processor. The report goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Any

import torch
from hardware import describe
from launch import launch
from reports import command, listed, met, stem, table, write_rows
from torch import Tensor

from ddpatch.config import Config, build
from ddpatch.execution import compile_fine_level, computes_bfloat16, keep_freed_memory
from ddpatch.io.volume import VolumeHeader
from ddpatch.log import peak_memory
from ddpatch.model.two_level import count_parameters
from ddpatch.parallel.collectives import Exchange
from ddpatch.parallel.comm import Communicator
from ddpatch.parallel.gradients import GradientSum
from ddpatch.rehearsal import rehearse, white_field
from ddpatch.run import decompose, make_denoiser, make_model

WARM_UP = 5  # steps that are not timed: until the memory that the C library keeps has grown to what a step takes
SIDE, TIMES = 2048, 3  # of the matrices, and of their products
POINTS, KERNEL = (8, 256, 32, 32), (256, 256, 3, 3)  # of the convolution beside them
CPU = torch.device("cpu")
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What takes a step: ranks, coupling, patches per axis, and how they are executed."""

    ranks: int
    coupling: str
    patches: int
    precision: str = "full"
    at_once: int | None = None
    compiled: bool = False

    def config(self, grid: int) -> Config:
        """Its configuration."""
        tree = {
            "domain": {"patch": [grid // self.patches] * 3, "grid": [grid] * 3, "periodic": [True] * 3},
            "data": {"path": "none"},
            "model": {"coupling": self.coupling},
            "train": {"batch": 1},
            "execution": {"precision": self.precision, "patches_at_once": self.at_once, "compile": self.compiled},
        }
        return build(tree, "benchmark")


MONOLITH, PERIODIC = "monolith", "monolith, periodic"
PATCHES, PARALLEL = "two-level", "two-level, 2 ranks"
FINE = "two-level without coarse level"
LOWER, COMPILED, WHOLE_COMPILED = "two-level, bfloat16", "two-level, bfloat16, compiled", "monolith, compiled"
RUNS = {
    MONOLITH: Run(1, "halo", 1),
    PERIODIC: Run(1, "u-net", 1),
    "monolith, bfloat16": Run(1, "halo", 1, "bfloat16"),
    PATCHES: Run(1, "two-level", 2),
    FINE: Run(1, "halo", 2),
    "two-level, a patch at a time": Run(1, "two-level", 2, "full", 1),
    LOWER: Run(1, "two-level", 2, "bfloat16"),
    COMPILED: Run(1, "two-level", 2, "bfloat16", compiled=True),
    WHOLE_COMPILED: Run(1, "halo", 1, compiled=True),
    PARALLEL: Run(2, "two-level", 2),
}
RATIOS: tuple[tuple[str, str, float | None], ...] = (  # one run over another, and the bar, if any
    (PATCHES, MONOLITH, 1.0),
    (PATCHES, PERIODIC, None),
    (FINE, MONOLITH, None),
    (LOWER, MONOLITH, 0.5),
    (COMPILED, WHOLE_COMPILED, 0.5),
    (PARALLEL, PATCHES, 1 / 1.8),
)


def velocities(grid: int) -> VolumeHeader:
    """The header of a sample with three channels."""
    return VolumeHeader(1, ("u", "v", "w"), (grid,) * 3, (1.0,) * 3, (True,) * 3)


def measure(run: Run, grid: int, steps: int, comm: Communicator) -> Row:
    """Median seconds of a training step on this communicator's ranks. Collective."""
    config = run.config(grid)
    torch.set_num_threads(1)
    keep_freed_memory(CPU, run.at_once)
    header = velocities(grid)
    field, exchange = white_field(config, header), Exchange(decompose(config, comm.size), comm, config.model.reach)
    network = make_model(config, field)
    denoiser, optimiser = make_denoiser(config, field, network, exchange), torch.optim.Adam(network.parameters(), fused=True)
    gradients = GradientSum(network.parameters(), comm)
    compile_fine_level(network, config.execution)
    clean, noise = torch.randn(2, 1, len(exchange.patches), len(field.channels), *config.domain.patch)
    seconds, communication = [], []

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        loss = denoiser.loss(clean, noise, torch.ones(1, dtype=torch.float64)) / (len(field.channels) * grid**3)
        loss.backward()
        comm.allreduce_(loss.detach()[None])
        gradients.finish()
        optimiser.step()

    for _ in range(WARM_UP + steps):
        comm.barrier()
        start, waited = time.perf_counter(), comm.seconds
        step()
        seconds.append(max(comm.gather(time.perf_counter() - start)))
        communication.append(comm.seconds - waited)
    return {
        "seconds": statistics.median(seconds[WARM_UP:]),
        "communication": statistics.median(communication[WARM_UP:]),
        "memory": max(comm.gather(peak_memory(CPU))),  # before the profiler takes some
        "convolutions": convolution_seconds(step),
        "parameters": count_parameters(network),
        "flops": rehearse(config, header, run.ranks).step.flops,
        "peak": measure_peak(torch.bfloat16 if run.precision == "bfloat16" else torch.float32),
    }


def convolution_seconds(step: Callable[[], None]) -> float:
    """Of a step, in convolutions of more than one point, forward and backward. Collective where the step is."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        step()
    return sum(entry.self_cpu_time_total for entry in seen.key_averages() if "convolution" in entry.key) / 1e6


def measure_peak(dtype: torch.dtype) -> float:
    """Operations per second of this core, in the product of two square matrices or in a convolution, whichever has more."""
    matrix, points, kernel = (torch.randn(shape).to(dtype) for shape in ((SIDE, SIDE), POINTS, KERNEL))
    points, kernel = (x.to(memory_format=torch.channels_last) for x in (points, kernel))
    ways: list[tuple[float, Callable[[], Tensor]]] = [
        (2 * SIDE**3, lambda: matrix @ matrix),
        (2 * math.prod(KERNEL) * points[:, 0].numel(), lambda: torch.conv2d(points, kernel, padding=1)),
    ]
    rates = []
    for operations, compute in ways * TIMES:
        start = time.perf_counter()
        compute()
        rates.append(operations / (time.perf_counter() - start))
    return max(rates)


def report(rows: list[Row], grid: int) -> str:
    """The Markdown page."""
    rounds = [{row["run"]: row for row in rows if row["round"] == i} for i in sorted({row["round"] for row in rows})]
    lines = [
        f"# One training step at {grid}³ × 3 channels, {date.today()}",
        "",
        f"{describe()}. `{command()}`",
        "",
        f"U-Net 32-64-128, one residual block per level and side, batch 1; the two-level model has 8 patches of {grid // 2}³.",
        "",
        *table(
            (
                "run",
                "parameters",
                "s per step",
                "in convolutions",
                "kvoxel/s",
                "GFLOP/s of a rank",
                "share of the peak",
                "GB of a rank",
            ),
            [[name, *cells([each[name] for each in rounds], grid)] for name in rounds[0]],
        ),
        *table(
            ("ratio of times", "median", "all rounds", "bar", "met"),
            [line(rounds, *ratio) for ratio in RATIOS if {*ratio[:2]} <= set(rounds[0])],
        ),
        *floor(rounds),
        *waits(rounds),
    ]
    return "\n".join([*lines, ""])


def floor(rounds: list[dict[str, Row]]) -> list[str]:
    """What convolutions alone gain from bfloat16, where the processor has it."""
    pairs = [(each[LOWER], each[MONOLITH]) for each in rounds if {LOWER, MONOLITH} <= set(each)]
    if not pairs:
        return []
    found = {
        "those of the two-level model in bfloat16 take of the monolith's in float32": [
            low["convolutions"] / whole["convolutions"] for low, whole in pairs
        ],
        "of its whole step": [low["convolutions"] / whole["seconds"] for low, whole in pairs],
        "at the peak of bfloat16 all convolutions and products would take of it": [
            low["flops"] / low["peak"] / whole["seconds"] for low, whole in pairs
        ],
        "the peak of float32 over that of bfloat16 is": [whole["peak"] / low["peak"] for low, whole in pairs],
    }
    texts = [f"{what} {statistics.median(values):.3f} ({listed(values)})" for what, values in found.items()]
    return [f"Convolutions alone, forward and backward, in a step beside the timed ones: {'; '.join(texts)}.", ""]


def waits(rounds: list[dict[str, Row]]) -> list[str]:
    """What two ranks communicate."""
    shares = [each[PARALLEL]["communication"] / each[PARALLEL]["seconds"] for each in rounds if PARALLEL in each]
    return [f"On 2 ranks {statistics.median(shares):.1%} of the step is communication, waiting included."] if shares else []


def cells(rows: list[Row], grid: int) -> list[str]:
    """What the rounds of one run come to."""
    seconds, convolutions = (statistics.median(r[key] for r in rows) for key in ("seconds", "convolutions"))
    rates = statistics.median(r["flops"] / r["seconds"] for r in rows)
    share = statistics.median(r["flops"] / r["seconds"] / r["peak"] for r in rows)
    speed, memory = f"{grid**3 / seconds / 1e3:.1f}", f"{max(r['memory'] for r in rows) / 1e9:.2f}"
    return [
        str(rows[0]["parameters"]),
        f"{seconds:.3f}",
        f"{convolutions:.3f}",
        speed,
        f"{rates / 1e9:.1f}",
        f"{share:.0%}",
        memory,
    ]


def line(rounds: list[dict[str, Row]], run: str, other: str, bar: float | None) -> list[str]:
    """The times of one run over those of another."""
    ratios = [each[run]["seconds"] / each[other]["seconds"] for each in rounds]
    middle = statistics.median(ratios)
    asked = ["", ""] if bar is None else [f"at most {bar:.3g}", met(middle <= bar)]
    return [f"{run} / {other}", f"{middle:.3f}", listed(ratios), *asked]


def main() -> None:
    """Alternate the runs and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, default=64, help="points per axis (default %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after five that are not (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="times that every run is made (default %(default)s)")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="default: all")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        comm = Communicator()
        found = measure(RUNS[args.worker], args.grid, args.steps, comm)
        if comm.rank == 0:
            print(json.dumps(found))
        return
    rows: list[Row] = []
    path = stem(f"step_{args.grid}" + "-some" * (args.runs != list(RUNS)))
    for i in range(args.rounds):
        for name in args.runs:
            run = RUNS[name]
            if run.precision == "full" or computes_bfloat16(CPU):
                options = ("--worker", name, "--grid", str(args.grid), "--steps", str(args.steps))
                rows.append({"round": i, "run": name, **json.loads(launch(run.ranks, __file__, *options).splitlines()[-1])})
                print(rows[-1], flush=True)
        write_rows(path.with_suffix(".csv"), rows)
        path.with_suffix(".md").write_text(report(rows, args.grid))
    print(report(rows, args.grid))


if __name__ == "__main__":
    main()
