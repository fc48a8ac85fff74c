"""An evaluation with the fields of a sampler on the GPU and in host memory: seconds, and the most memory of the GPU.

    python benchmarks/host.py --grid 512                                        # meant for a GPU
    python benchmarks/host.py --grid 64 --patch 16 --channels 8 16 --threads 2   # a processor, where nothing travels

Steps of DPM-Solver++(2M) on a periodic cube of three channels, a patch at a time, features in bfloat16 on a GPU, with the network
of a run of one step; each placement in a process of its own, in turn, several times. The report goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from device import seconds
from hardware import describe
from launch import launch
from reports import command, stem, table, write_rows
from streaming import write_noise

from ddpatch.config import build
from ddpatch.log import peak_memory
from ddpatch.parallel.comm import Communicator
from ddpatch.sample import Sampler
from ddpatch.train import train

PLACES = ("device", "host")
SOLVER = "dpm++2m"
Row = dict[str, Any]


def measure(place: str, args: argparse.Namespace) -> Row:
    """One placement in this process: seconds of an evaluation, from the difference of long and short trajectories."""
    comm = Communicator()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_noise(folder / "data.h5", args.patch, 1)
        tree = {
            "domain": {"patch": [args.patch] * 3},
            "data": {"path": str(folder / "data.h5")},
            "model": {"channels": args.channels},
            "train": {"steps": 1, "batch": 1},
        }
        train(build(tree, "benchmark"), folder / "run", comm)
        precision = "bfloat16" if torch.cuda.is_available() else "full"
        options = [f"sample.on_host={place == 'host'}".lower(), "execution.patches_at_once=1", f"execution.precision={precision}"]
        sampler = Sampler(folder / "run", comm, (args.grid,) * 3, options)
    device = sampler.device

    def draw(steps: int) -> float:
        return seconds(lambda: sampler.draw([0], 0, SOLVER, steps, shift=True), device)

    draw(1)
    few, many = draw(1), draw(1 + args.steps)
    return {"place": place, "seconds": (many - few) / args.steps, "memory": peak_memory(device) / 1e9}


def report(rows: list[Row], args: argparse.Namespace) -> str:
    """The Markdown page."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "processor"
    cells = []
    for place in PLACES:
        found = [row for row in rows if row["place"] == place]
        times = [row["seconds"] for row in found]
        cells.append((place, f"{statistics.median(times):.3f}", " ".join(f"{s:.3f}" for s in times), f"{found[0]['memory']:.2f}"))
    return "\n".join(
        [
            f"# Fields on the device and in host memory, {date.today()}",
            "",
            f"{name}; host: {describe(args.threads)}. `{command()}`",
            "",
            f"{args.grid}³ × 3, patches of {args.patch}³ one at a time, U-Net {'-'.join(map(str, args.channels))}.",
            "",
            *table(("fields", "s per evaluation, median", "rounds", "GB"), cells),
        ]
    )


def main() -> None:
    """Measure in turn, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, default=512, help="points per axis (default %(default)s)")
    parser.add_argument("--patch", type=int, default=64, help="points per axis (default %(default)s)")
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64, 128], help="of the U-Net (default 32 64 128)")
    parser.add_argument("--steps", type=int, default=3, help="timed (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of both placements (default %(default)s)")
    parser.add_argument("--threads", type=int, default=8, help="of the host (default %(default)s)")
    parser.add_argument("--worker", choices=PLACES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.worker, args)))
        return
    options = [f"--{key}={getattr(args, key)}" for key in ("grid", "patch", "steps")]
    options += ["--channels", *map(str, args.channels)]
    rows: list[Row] = []
    for place in PLACES * args.rounds:
        rows.append(json.loads(launch(1, __file__, *options, "--worker", place, threads=args.threads).splitlines()[-1]))
        print(rows[-1], flush=True)
    path = stem(f"host_{'cuda' if torch.cuda.is_available() else 'cpu'}")
    write_rows(path.with_suffix(".csv"), rows)
    path.with_suffix(".md").write_text(report(rows, args))
    print(report(rows, args))


if __name__ == "__main__":
    main()
