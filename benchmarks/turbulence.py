"""Couplings on turbulence: equal parameters, equal training, side by side.

    python benchmarks/turbulence.py              # small: half an hour on two cores; resumes where it was
    python benchmarks/turbulence.py --more       # with our network on the full domain, moving tilings and lagged tokens
    python benchmarks/turbulence.py --full       # for a GPU: larger fields, wider networks, longer training
    python benchmarks/turbulence.py --seed 1 --flows kolmogorov --schemes tokens "halo and tokens"    # another training of some
    python benchmarks/turbulence.py --samples 256 --flows isotropic     # the same networks, told apart by more samples

Two flows: two-dimensional Kolmogorov flow on 16 patches, forced isotropic turbulence on 8 patches. Schemes: one U-Net on the full
domain; independent patches; overlapping windows whose predictions are averaged at every step (MultiDiffusion); independent
patches whose tiling moves at every step (PaDIS); halo only; tokens only; both. MultiDiffusion and PaDIS sample with the network
of the independent patches. Where patches are coupled the tiling stands still, as it does by default. And, with --more: "full
domain, same network" is that of halo and tokens with the grid for a patch, as it would be if nothing had to be cut; "moving
tiling" is of coupled patches too, and "lagged" has a coarse level that speaks of the evaluation before, both at the level scale
found without. Of overlapping windows, which cost most and show most, a sixteenth as many samples are drawn, and a quarter of
independent patches whose tiling moves, which no bar is about. Where there is no transformer the coarsest level is wider for it.
Every network but that of independent patches is calibrated (ddpatch calibrate) on the training data, with other noise than the
samples have; there, and where no level scale mends the energy, it is 1.
"ln E, λ = 1" is the mean over the resolved shells of ln(E_gen / E_data) before that.
The first row is that of the training data themselves: what no sampler can be expected to beat.

Figures are distances to an independent reference in units of the noise floor, that is of the distance between two halves of the
reference (ddpatch evaluate), and the mean |ln(E_gen / E_ref)| over the resolved shells itself. The seam ratio J is given itself:
1 is perfect, also where the borders of the reference lie at fixed phases of its force and its own J differs from 1, since
training shifts the origin at random. Whether halo and tokens together are ahead of another scheme, and by how much more than
chance, is asked of the samples (ahead.py), which begin with the same noise in all schemes.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from flows import FULL, MORE, SCHEMES, SMALL, Flow, samples_of
from launch import launch
from reports import stem, write_rows
from turbulence_page import GIVEN, report

from ddpatch.calibration import CALIBRATION
from ddpatch.couplings import COUPLINGS

LONGEST = ("full-domain", "u-net", "two-level", "halo", "tokens", "none")  # first, in 3-D before 2-D: no core waits at the end
FEWER = {"overlapping windows": 16, "moving tiling": 4}  # times as many samples are drawn of the other schemes
UNCALIBRATED = "none"  # patches that show have an energy that no level scale mends
WORKERS = 1 if torch.cuda.is_available() else min(2, len(os.sched_getaffinity(0)))  # trainings at a time, and ranks of a sampling


def prepare(flow: Flow, folder: Path, drawn: Path) -> None:
    """Data and reference, from different simulations."""
    drawn.mkdir(parents=True, exist_ok=True)
    for path, samples, seed in ((folder / "data.h5", flow.samples[0], "0"), (drawn / "reference.h5", flow.samples[1], "1")):
        if not path.exists():
            options = ["--grid", str(flow.grid), "--samples", str(samples), "--seed", seed]
            options += ["--viscosity", str(flow.viscosity)] * (flow.viscosity is not None)
            launch(WORKERS, "-m", "ddpatch", "simulate", flow.kind, *options, "--output", str(path))


def train(flow: Flow, coupling: str, folder: Path) -> None:
    """Train the network of one coupling on one rank, or go on with it."""
    run = folder / coupling
    run.mkdir(exist_ok=True)
    tree = {
        "domain": {"patch": list(flow.patch)},
        "data": {"path": str(folder / "data.h5")},
        "model": {**flow.model, "coupling": coupling, **({} if COUPLINGS[coupling].coarse else {"channels": flow.uncoupled})},
        "train": {**flow.train, "warmup": 50},
        "sample": {"batch": flow.together},
    }
    (run / "benchmark.yaml").write_text(yaml.safe_dump(tree))
    launch(1, "-m", "ddpatch", "train", str(run / "benchmark.yaml"), "--run", str(run), log=run / "progress.txt")
    if coupling != UNCALIBRATED and not (run / CALIBRATION).exists():
        with suppress(SystemExit):
            launch(1, "-m", "ddpatch", "calibrate", str(run), "--count", str(flow.samples[2]), log=run / "calibration.txt")


def train_all(flows: dict[str, Flow], schemes: Sequence[str], folder: Path) -> None:
    """Train the networks of some schemes, a core each."""
    couplings = {SCHEMES[scheme][0] for scheme in schemes}
    jobs = [(flows[kind], coupling, folder / kind) for kind in reversed(flows) for coupling in LONGEST if coupling in couplings]
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(lambda job: train(*job), jobs))


def measure(flow: Flow, scheme: str, folder: Path, drawn: Path) -> dict[str, Any]:
    """Sample and compare one scheme, once."""
    coupling, way = SCHEMES[scheme]
    samples = samples_of(scheme, drawn)
    kept = samples.with_suffix(".json")
    if not kept.exists():
        ranks = WORKERS if way != "overlap" and not COUPLINGS[coupling].whole else 1
        count = flow.samples[3] // FEWER.get(scheme, 1)
        found = start_worker(flow, ranks, folder / coupling, way, count, samples, drawn)
        kept.write_text(json.dumps({"flow": flow.kind, "scheme": scheme, **found}))
    return dict(json.loads(kept.read_text()))


def start_worker(flow: Flow, ranks: int, run: Path, way: str, count: int, samples: Path, drawn: Path) -> dict[str, Any]:
    """What turbulence_worker.py prints."""
    patch = "x".join(map(str, flow.patch))
    script, reference = str(Path(__file__).with_name("turbulence_worker.py")), str(drawn / "reference.h5")
    printed = launch(ranks, script, str(run), way, str(count), str(samples), reference, patch, threads=WORKERS // ranks)
    return dict(json.loads(printed.splitlines()[-1]))


def measure_data(flow: Flow, folder: Path, drawn: Path) -> dict[str, Any]:
    """The row of the training data."""
    found = start_worker(flow, WORKERS, folder, GIVEN, 0, folder / "data.h5", drawn)
    return {"flow": flow.kind, "scheme": "the training data", **found}


def main() -> None:
    """Train, sample, evaluate, report, one scheme after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the mode for a GPU")
    parser.add_argument("--flows", nargs="+", choices=SMALL, default=list(SMALL))
    parser.add_argument("--more", action="store_true", help="all schemes, not only those that the bars are about")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES)
    parser.add_argument("--seed", type=int, default=0, help="of the training and of the samples (default %(default)s)")
    parser.add_argument("--samples", type=int, help="to be drawn, and of reference (default: as many as the flow has)")
    parser.add_argument("--folder", type=Path, default=Path("runs/turbulence"), help="of data and runs (default %(default)s)")
    args = parser.parse_args()
    known = FULL if args.full else SMALL
    flows = {kind: told(known[kind], args.seed, args.samples) for kind in args.flows}
    name = ("full" if args.full else "small") + f"-seed{args.seed}" * bool(args.seed)
    schemes = args.schemes or [scheme for scheme in SCHEMES if args.more or scheme not in MORE]
    run_all(flows, schemes, args.folder / name, name, f"samples{args.samples}" if args.samples else "")


def told(flow: Flow, seed: int, samples: int | None) -> Flow:
    """The flow with another seed, and another number of samples and of reference."""
    data, reference, calibration, count = flow.samples
    counts = data, samples or reference, calibration, samples or count
    return replace(flow, train={**flow.train, "seed": seed}, samples=counts)


def run_all(flows: dict[str, Flow], schemes: Sequence[str], folder: Path, name: str, drawn: str = "") -> None:
    """All schemes of all flows; the report is written after each flow."""
    rows: list[dict[str, Any]] = []
    name, fresh, start = "-".join(filter(None, (name, drawn))), not folder.exists(), time.perf_counter()
    path = stem(f"turbulence_{name}")
    for kind, flow in flows.items():
        prepare(flow, folder / kind, folder / kind / drawn)
    train_all(flows, schemes, folder)
    for kind, flow in flows.items():
        rows += draw_all(flow, schemes, folder / kind, folder / kind / drawn)
        write_rows(path.with_suffix(".csv"), rows)
        page = report(rows, flows, folder, name, drawn)
        spent = f"From the first simulation to this line: {(time.perf_counter() - start) / 60:.1f} minutes.\n" if fresh else ""
        path.with_suffix(".md").write_text(page + spent)


def draw_all(flow: Flow, schemes: Sequence[str], folder: Path, drawn: Path) -> list[dict[str, Any]]:
    """The rows of a flow; networks are in one folder, reference and samples in the other."""
    rows = [measure_data(flow, folder, drawn)]
    for scheme in schemes:
        rows.append(measure(flow, scheme, folder, drawn))
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
