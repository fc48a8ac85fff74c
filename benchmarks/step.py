"""Time of one training step: the two-level model against a monolithic U-Net of equal width, and two ranks against one.

    python benchmarks/step.py                       # about 6 minutes on two cores; needs them to itself

The monolith is the same encoder, bottleneck and decoder on the whole volume as one patch, without tokens and transformer. Every
rank has one thread. Runs alternate, so that a drift of the machine's speed hits all alike; figures are medians, ratios are taken
within a round. The report goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from datetime import date

import torch
from hardware import describe
from launch import launch
from reports import listed, stem, write_rows

from ddpatch.config import build
from ddpatch.data.normalisation import Normalisation
from ddpatch.diffusion.denoiser import detached_sum
from ddpatch.model.two_level import count_parameters
from ddpatch.parallel.collectives import Exchange
from ddpatch.parallel.comm import Communicator
from ddpatch.parallel.gradients import GradientSum
from ddpatch.run import Field, decompose, make_denoiser, make_model

RUNS = {"monolith, 1 rank": (1, "monolith"), "two-level, 1 rank": (1, "two-level"), "two-level, 2 ranks": (2, "two-level")}


def measure(model: str, grid: int, steps: int) -> dict[str, float]:
    """Median seconds of a training step on this communicator's ranks. Collective."""
    comm = Communicator()
    torch.set_num_threads(1)
    patch, way = (grid, "halo") if model == "monolith" else (grid // 2, "two-level")
    domain = {"patch": [patch] * 3, "grid": [grid] * 3, "periodic": [True] * 3}
    config = build({"domain": domain, "data": {"path": "none"}, "model": {"coupling": way}}, "benchmark")
    exchange = Exchange(decompose(config, comm.size), comm, config.model.reach)
    size = 3 * 3**3
    stencil = tuple(tuple(float(i == j) for j in range(size)) for i in range(size))
    field = Field(("u", "v", "w"), (1.0,) * 3, Normalisation((0.0,) * 3, (1.0,) * 3), 0.01, 100.0, stencil, ((1.0,), (1.0,)))
    network = make_model(config, field)
    denoiser, optimiser = make_denoiser(config, field, network, exchange), torch.optim.Adam(network.parameters())
    gradients = GradientSum(network.parameters(), comm)
    clean, noise = torch.randn(2, 1, len(exchange.patches), 3, *(patch,) * 3)
    seconds, communication = [], []
    for _ in range(steps + 1):
        comm.barrier()
        start, waited = time.perf_counter(), comm.seconds
        losses = denoiser.loss(clean, noise, torch.ones(1, dtype=torch.float64))
        optimiser.zero_grad(set_to_none=True)
        (losses.sum() / (3 * grid**3)).backward()
        comm.allreduce_(detached_sum(losses)[None])
        gradients.finish()
        optimiser.step()
        seconds.append(max(comm.gather(time.perf_counter() - start)))
        communication.append(comm.seconds - waited)
    return {
        "seconds": statistics.median(seconds[1:]),
        "communication": statistics.median(communication[1:]),
        "parameters": count_parameters(network),
    }


def report(rows: list[dict[str, float | str]], grid: int, command: str) -> str:
    """The Markdown page."""
    median = {name: statistics.median(float(r["seconds"]) for r in rows if r["run"] == name) for name in RUNS}
    rounds = [{str(r["run"]): float(r["seconds"]) for r in rows if r["round"] == i} for i in sorted({r["round"] for r in rows})]
    overhead = [r["two-level, 1 rank"] / r["monolith, 1 rank"] for r in rounds]
    speedup = [r["two-level, 1 rank"] / r["two-level, 2 ranks"] for r in rounds]
    waits = statistics.median(float(r["communication"]) for r in rows if r["run"] == "two-level, 2 ranks")
    lines = [
        f"# One training step at {grid}³ × 3 channels, {date.today()}",
        "",
        f"{describe()}. `{command}`",
        "",
        f"U-Net 32-64-128, one residual block per level and side, batch 1; the two-level model has 8 patches of {grid // 2}³.",
        "",
        "| run | parameters | s per step | kvoxel/s |",
        "|---|---|---|---|",
        *(
            f"| {n} | {next(r['parameters'] for r in rows if r['run'] == n)} | {s:.3f} | {grid**3 / s / 1e3:.1f} |"
            for n, s in median.items()
        ),
        "",
        "| ratio, per round | median | all rounds | bar |",
        "|---|---|---|---|",
        f"| two-level / monolith, 1 rank | {statistics.median(overhead):.3f} | {listed(overhead)} | at most 1.25 |",
        f"| 1 rank / 2 ranks, two-level | {statistics.median(speedup):.3f} | {listed(speedup)} | at least 1.8 |",
        "",
        f"On 2 ranks {waits / median['two-level, 2 ranks']:.1%} of the step is communication, waiting included.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Alternate the runs and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, default=64, help="points per axis (default %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a run, after one that is not (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="times that every run is made (default %(default)s)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.worker, args.grid, args.steps)))
        return
    rows: list[dict[str, float | str]] = []
    for i in range(args.rounds):
        for name, (ranks, model) in RUNS.items():
            options = ("--worker", model, "--grid", str(args.grid), "--steps", str(args.steps))
            rows.append({"round": i, "run": name, **json.loads(launch(ranks, __file__, *options).splitlines()[-1])})
            print(rows[-1], flush=True)
    path = stem("step")
    write_rows(path.with_suffix(".csv"), rows)
    text = report(rows, args.grid, f"python benchmarks/step.py --grid {args.grid} --steps {args.steps} --rounds {args.rounds}")
    path.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
