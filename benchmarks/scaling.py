"""Strong and weak scaling of a training step and of a solver's evaluation, and what the time goes to.

    python benchmarks/scaling.py --mode strong --ranks 1 2      # about half an hour on two cores, which it needs to itself
    python benchmarks/scaling.py --mode weak --ranks 1 2        # about 15 minutes
    sbatch jobs/scaling.sbatch                                  # on a cluster: ranks are started by srun then

strong: one grid for all numbers of ranks; weak: as many points per rank, and, outside SLURM, beside as many jobs of one rank that
know nothing of each other: what the machine itself loses when more of it is busy. All take turns in every round, so that a drift
of the machine's speed hits all alike; efficiencies are taken within a round. A step's time is that of its slowest rank, and a
figure the median over the steps of a launch, then over the rounds. The report goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from launch import launch
from problem import noise_patches, open_training, write
from reports import RESULTS, stem, write_rows
from scaling_page import write_page
from timing import MEASURED, WARM_UP, measure

from ddpatch.config import ModelConfig
from ddpatch.decomposition import Decomposition
from ddpatch.errors import UserError
from ddpatch.parallel.comm import Communicator, guard
from ddpatch.training import Training

POINTS = {"strong": 128, "weak": 96}  # per axis: of the grid, or of every rank's box
Row = dict[str, Any]


def grid_of(mode: str, side: int, ranks: int) -> tuple[int, ...]:
    """Points per axis; weak: a box of ``side`` points per axis for every rank, in the arrangement nearest to a cube."""
    if mode == "strong":
        return (side,) * 3
    divisors = [n for n in range(ranks, 0, -1) if ranks % n == 0]
    boxes = min(((a, b, ranks // (a * b)) for a in divisors for b in divisors if ranks % (a * b) == 0), key=sum)
    return tuple(side * n for n in boxes)


def work(args: argparse.Namespace, comm: Communicator) -> None:
    """Measure on these ranks, and print the rows. Collective."""
    grid = grid_of(args.mode, args.points, comm.size)
    model = {"channels": args.channels, "tokens": args.tokens, "coarse_keys": args.keys}
    with open_training(args.worker, grid, (args.patch,) * 3, model, comm, {"compile": args.compile}) as training:
        verbs = {"train": measure_training, "sample": measure_sampling}
        rows = [
            {"mode": args.mode, "verb": verb, **describe_ranks(training), **verbs[verb](training, args.steps)}
            for verb in args.verb
        ]
    if comm.rank == 0:
        print(json.dumps(rows))


def describe_ranks(training: Training) -> Row:
    """What a row says besides seconds. Collective."""
    comm, grid, threads = training.comm, training.decomposition, torch.get_num_threads()
    places = comm.gather((platform.node(), os.sched_getaffinity(0)))
    nodes = {name: [cores for other, cores in places if other == name] for name, _ in places}
    return {
        "ranks": comm.size,
        "jobs": 1,
        "nodes": len(nodes),
        "grid": "×".join(map(str, grid.grid_shape)),
        "patches_per_rank": max(grid.counts),
        "threads": threads,
        "oversubscribed": any(len(usable) * threads > len(set().union(*usable)) for usable in nodes.values()),
    }


def measure_training(training: Training, steps: int) -> Row:
    """Seconds of a training step. Collective."""
    return measure(training.advance, training, steps)


def measure_sampling(training: Training, steps: int) -> Row:
    """Seconds of an evaluation by a solver, with its share of writing a sample. Collective."""
    grid, comm = training.decomposition, training.comm
    patches, folder = noise_patches(grid, comm), Path(training.config.data.path).parent
    x, sigma = patches[None].to(training.device), torch.ones(1, dtype=torch.float64, device=training.device)

    @torch.no_grad()
    def evaluate() -> float:
        return float(training.denoiser(x, sigma).sum())  # a number, for which one has to wait

    row, evaluations = measure(evaluate, training, steps), training.config.sample.steps
    row["io"] = measure(lambda: write(folder / "sample.h5", patches, grid, comm), training, steps)["total"] / evaluations
    return {**row, "total": row["total"] + row["io"]}


def efficiency(row: Row, least: Row) -> float:
    """Time of the fewest ranks over that of these; strong: times the fewest ranks over these ranks."""
    return least["total"] / row["total"] * (least["ranks"] / row["ranks"] if row["mode"] == "strong" else 1.0)


def add_efficiencies(rows: list[Row]) -> None:
    """Compare every row with that of the fewest ranks in its round."""
    for row in rows:
        peers = [other for other in rows if (other["verb"], other["round"], other["jobs"]) == (row["verb"], row["round"], 1)]
        row["efficiency"] = efficiency(row, min(peers, key=lambda other: other["ranks"]))


def launch_jobs(ranks: int, jobs: int, args: argparse.Namespace, folder: Path) -> list[Row]:
    """The rows of some ranks, or of as many jobs side by side: their slowest, column by column."""

    def start(job: int) -> list[Row]:
        (own := folder / str(job)).mkdir(exist_ok=True)
        printed = launch(ranks, __file__, *sys.argv[1:], "--worker", str(own), threads=args.threads)
        found: list[Row] = json.loads(printed.splitlines()[-1])
        return found

    with ThreadPoolExecutor(jobs) as pool:
        every = list(pool.map(start, range(jobs)))
    return [
        {**same[0], "jobs": jobs, **{key: max(row[key] for row in same) for key in MEASURED}} for same in zip(*every, strict=True)
    ]


def run(args: argparse.Namespace) -> None:
    """Let the numbers of ranks take turns, with a report of what there is after every launch."""
    rows: list[Row] = []
    args.folder.mkdir(parents=True, exist_ok=True)
    only = "".join(f"-{verb}" for verb in args.verb if len(args.verb) == 1)
    tokens = f"-tokens{args.tokens}" if args.tokens != ModelConfig.tokens else ""
    keys = f"-keys{args.keys}" if args.keys else ""
    path, page = stem(f"scaling_{args.mode}{only}{tokens}{keys}{'-compiled' * args.compile}", args.output), ""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for i in range(args.rounds):
            alone = args.mode == "weak" and "SLURM_JOB_ID" not in os.environ
            for ranks, jobs in [(n, 1) for n in args.ranks] + [(1, n) for n in args.ranks if alone and n > 1]:
                rows += [{"round": i, **row} for row in launch_jobs(ranks, jobs, args, Path(folder))]
                print(*rows[-len(args.verb) :], sep="\n", flush=True)
                add_efficiencies(rows)
                write_rows(path.with_suffix(".csv"), rows)
                page = write_page(rows, args, path)
    print(page)


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=POINTS, required=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks (default 1 2)")
    parser.add_argument("--verb", nargs="+", choices=("train", "sample"), default=["train", "sample"])
    parser.add_argument("--threads", type=int, default=1, help="per rank (default %(default)s)")
    parser.add_argument("--points", type=int, help="per axis; strong: of the grid (128), weak: of every rank's box (96)")
    parser.add_argument("--patch", type=int, default=32, help="points per axis (default %(default)s)")
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64, 128], help="of the U-Net (default 32 64 128)")
    parser.add_argument("--tokens", type=int, default=ModelConfig.tokens, help="per patch and axis (default %(default)s)")
    parser.add_argument("--keys", type=int, help="per patch and axis, to which tokens attend (default: every token)")
    parser.add_argument("--compile", action="store_true", help="let torch compile the fine level")
    parser.add_argument(
        "--steps", type=int, default=3, help=f"timed steps of a launch, after {WARM_UP} that are not (default %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="launches with every number of ranks (default %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="for data, seen by all ranks (default %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the report (default benchmarks/results)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.points = args.points or POINTS[args.mode]
    if args.worker:
        sys.exit(guard(lambda comm: work(args, comm)))
    for ranks in args.ranks:
        try:
            Decomposition(grid_of(args.mode, args.points, ranks), (args.patch,) * 3, ranks)
        except UserError as mistake:
            parser.error(str(mistake))
    run(args)


if __name__ == "__main__":
    main()
