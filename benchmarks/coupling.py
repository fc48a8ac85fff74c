"""How much of the gap between the patch-alone and the global optimum do trained couplings close?

    python benchmarks/coupling.py 64x64                      # every coupling, half an hour on two cores; resumes where it was
    python benchmarks/coupling.py 64x64 --couplings default  # one of them
    python benchmarks/coupling.py 32x32x32                   # three dimensions
    python benchmarks/coupling.py 64x64-adam --couplings default     # the default with Adam instead of Muon
    python benchmarks/coupling.py 64x64-network-keys2 --couplings default    # without linear part, 2² keys a patch in place of 4²

Data are periodic Gaussian random fields of spectrum (1 + (k/2)²)^-p. The error of the best denoiser that sees everything, and of
the best that sees one patch, are exact (ddpatch/statistics/oracle.py). At every noise level

    share = 1 - <|D - W|²> / (E_patch - E_global),

with the model's prediction D and the global optimum's, W, on the same noisy fields: the error of W is orthogonal to D - W, so
that this is (E_patch - E_D) / (E_patch - E_global) with far less Monte-Carlo error. 0 is the best denoiser of patches that do not
communicate. Noise levels are u of x_t = cos(uπ/2) x + sin(uπ/2) n. Fields and noise are those of no training step.

A trained model is tried on a grid of twice the points per axis too, on more of the same field. Rows go to
benchmarks/results/coupling_<grid>_<machine>_<date>.csv, with a report and plots beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import yaml
from hardware import describe
from launch import launch
from reports import met, write_rows
from torch import Tensor

from ddpatch.couplings import COUPLINGS
from ddpatch.data.gaussian import PowerLaw, draw
from ddpatch.errors import UserError, nearest
from ddpatch.io.volume import VolumeHeader, write_volume
from ddpatch.model.two_level import count_parameters
from ddpatch.parallel.comm import Communicator, guard
from ddpatch.random import Stream, generator
from ddpatch.sample import Sampler
from ddpatch.statistics.oracle import GaussianOracle, noise_level

RESULTS = Path(__file__).parent / "results"
Bounds = dict[str, list[float]]
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9)
TRAIN_SEED, TEST_SEED = 0, 1


@dataclass(frozen=True)
class Case:
    """A field, its patches and the model."""

    grid: tuple[int, ...]
    patch: tuple[int, ...]
    exponent: float
    samples: int
    tested: int
    bar: float
    model: dict[str, Any]
    train: dict[str, Any]


CASES = {
    "64x64": Case(
        (64, 64),
        (16, 16),
        2.0,
        4096,
        256,
        0.95,
        {"channels": [16, 32, 64], "halo": 4, "token_channels": 16, "coarse_width": 64, "coarse_layers": 3},
        {"steps": 1000, "batch": 8, "ema": 600.0},
    ),
    "32x32x32": Case(
        (32, 32, 32),
        (16, 16, 16),
        3.0,
        512,
        32,
        0.90,
        {"channels": [16, 32, 64], "halo": 4, "token_channels": 16, "coarse_width": 64, "coarse_layers": 3},
        {"steps": 500, "batch": 2, "ema": 200.0},
    ),
}
ADAM = {**CASES["64x64"].train, "optimiser": "adam", "learning_rate": 3e-3}
CASES["64x64-adam"] = replace(CASES["64x64"], train=ADAM)
for keys in (4, 2, 1):  # what the coarse level learns by itself, by the number of means that tokens attend to
    network = {**CASES["64x64"].model, "wiener": False, "coarse_keys": keys}
    CASES[f"64x64-network-keys{keys}"] = replace(CASES["64x64"], model=network)


@dataclass(frozen=True)
class Row:
    """One line of the CSV."""

    coupling: str
    grid: str
    patch: str
    u: float
    share: float
    share_error: float
    parameters: int
    seconds: float
    steps: int


def name(shape: tuple[int, ...]) -> str:
    """For example 64x64."""
    return "x".join(map(str, shape))


def power(case: Case, grid: tuple[int, ...]) -> Tensor:
    """Mode variances of the case's field on its grid, or on a larger piece of the same field."""
    law = PowerLaw(2.0, case.exponent)
    unit, wanted = law.power(case.grid), law.power(grid, case.grid[0] / grid[0])
    return wanted * (unit.flatten()[0] / wanted.flatten()[0])


def write_data(case: Case, path: Path) -> None:
    """The training fields."""
    if not path.exists():
        header = VolumeHeader(case.samples, ("u",), case.grid, (1.0,) * len(case.grid), (True,) * len(case.grid))
        spectrum = power(case, case.grid)
        fields = (draw(spectrum, generator(TRAIN_SEED, Stream.SIMULATION, i))[None] for i in range(case.samples))
        write_volume(path, header, (field.float().numpy() for field in fields))


def train(case: Case, coupling: str, folder: Path, data: Path, ranks: int) -> float:
    """Train one coupling, or go on with it; returns the seconds that it took in all."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "benchmark.yaml"
    tree = {
        "domain": {"patch": list(case.patch)},
        "data": {"path": str(data)},
        "model": {**case.model, "coupling": coupling},
        "train": {**case.train, "warmup": 50, "checkpoint_every": 250},
    }
    config.write_text(yaml.safe_dump(tree))
    ranks = 1 if COUPLINGS[coupling].whole else ranks
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    launch(ranks, "-m", "ddpatch", "train", str(config), "--run", str(folder), threads=threads)
    rows = {row["step"]: row for row in map(json.loads, (folder / "log.jsonl").read_text().splitlines())}
    return float(sum(row["seconds"] for row in rows.values()))


def measure(
    case: Case,
    coupling: str,
    run: Path,
    grid: tuple[int, ...],
    bounds: Bounds,
    seconds: float,
    comm: Communicator,
) -> list[Row]:
    """The share of the gap that a trained model closes on a grid, at every noise level."""
    sampler, oracle = Sampler(run, comm, grid), GaussianOracle(power(case, grid))
    scale = sampler.field.normalisation.std[0]
    count = max(8, case.tested * torch.Size(case.grid).numel() // torch.Size(grid).numel())
    rows = []
    label, parameters = "default" if coupling == "two-level" else coupling, count_parameters(sampler.model)
    for level, u in enumerate(LEVELS):
        randoms = (generator(TEST_SEED, Stream.SIMULATION, i, level) for i in range(count))
        with torch.no_grad():
            distances = oracle.distances(
                lambda x, s: sampler.denoise(x / scale, s / scale) * scale, sampler.decomposition, noise_level(u), randoms
            )
        gap = bounds["patch"][level] - bounds["global"][level]
        share, error = 1 - float(distances.mean()) / gap, float(distances.std()) / count**0.5 / gap
        rows.append(Row(label, name(grid), name(case.patch), u, share, error, parameters, seconds, case.train["steps"]))
    return rows


def find_bounds(case: Case, grid: tuple[int, ...], cache: Path) -> Bounds:
    """Exact minimal errors at every noise level, by what is seen."""
    if cache.exists():
        found: Bounds = json.loads(cache.read_text())
        return found
    oracle, sigmas = GaussianOracle(power(case, grid)), [noise_level(u) for u in LEVELS]
    halos = (1, 2, 4) if len(grid) == 2 else (1, 2)  # a window of 24³ points takes minutes
    bounds = {
        "global": [oracle.everything(s) for s in sigmas],
        "patch": [oracle.patch(case.patch, s) for s in sigmas],
        **{f"halo {width}": [oracle.patch(case.patch, s, width) for s in sigmas] for width in halos},
        f"4^{len(grid)} block means of every patch": [oracle.patch(case.patch, s, 0, 4) for s in sigmas],
        f"block means and halo {halos[-1]}": [oracle.patch(case.patch, s, halos[-1], 4) for s in sigmas],
    }
    cache.write_text(json.dumps(bounds))
    return bounds


def report(case: Case, rows: list[Row], bounds: Bounds, command: str) -> str:
    """The Markdown page."""
    levels = " | ".join(f"u = {u:g}" for u in LEVELS)
    gaps = [(p - g) / p for p, g in zip(bounds["patch"], bounds["global"], strict=True)]
    lines = [
        f"# Couplings on Gaussian fields, {name(case.grid)}, patches of {name(case.patch)}, {date.today()}",
        "",
        f"{describe()}. `{command}`",
        "",
        f"Spectrum (1 + (k/2)²)^-{case.exponent:g}; model {case.model}; training {case.train}. One seed each.",
        "",
        "## What can be known: exact",
        "",
        f"| seen | {levels} |",
        "|---|" + "---|" * len(LEVELS),
        "| gap, of the patch-alone error | " + " | ".join(f"{g:.1%}" for g in gaps) + " |",
    ]
    for seen in list(bounds)[2:]:
        shares = [(p - s) / (p - g) for p, s, g in zip(bounds["patch"], bounds[seen], bounds["global"], strict=True)]
        lines.append(f"| {seen}: share of the gap | " + " | ".join(f"{s:.3f}" for s in shares) + " |")
    lines += ["", "## What trained models close: share of the gap ± Monte-Carlo error", ""]
    lines += [f"| coupling | grid | {levels} | parameters | s |", "|---|---|" + "---|" * len(LEVELS) + "---|---|"]
    groups = dict.fromkeys((row.coupling, row.grid) for row in rows)
    for coupling, grid in groups:
        mine = [row for row in rows if (row.coupling, row.grid) == (coupling, grid)]
        cells = " | ".join(f"{row.share:.3f} ± {row.share_error:.3f}" for row in mine)
        lines.append(f"| {coupling} | {grid} | {cells} | {mine[0].parameters} | {mine[0].seconds:.0f} |")
    lines += ["", "## Bars", "", "| bar | least or largest share | met |", "|---|---|---|", *bars(case, rows)]
    return "\n".join(lines) + "\n"


def bars(case: Case, rows: list[Row]) -> list[str]:
    """What the shares have to be, and whether they are."""
    lines = []
    for grid, least in ((name(case.grid), case.bar), (name(double(case)), 0.85)):
        shares = [row.share for row in rows if (row.coupling, row.grid) == ("default", grid)]
        if shares:
            lines.append(f"| default, {grid}: at least {least:g} at every u | {min(shares):.3f} | {met(min(shares) >= least)} |")
    for control in ("self-only", "none"):
        beyond = [row.share - 3 * row.share_error for row in rows if row.coupling == control]
        if beyond:
            largest = max(row.share for row in rows if row.coupling == control)
            lines.append(f"| {control}: not above 0 by three errors | {largest:.3f} | {met(max(beyond) <= 0)} |")
    return lines


def double(case: Case) -> tuple[int, ...]:
    """The grid of twice the points per axis."""
    return tuple(2 * n for n in case.grid)


def plot(case: Case, rows: list[Row], bounds: Bounds, path: Path) -> None:
    """Shares over noise levels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for coupling in dict.fromkeys(row.coupling for row in rows):
        mine = [row for row in rows if (row.coupling, row.grid) == (coupling, name(case.grid))]
        errors = [row.share_error for row in mine]
        axes.errorbar([r.u for r in mine], [r.share for r in mine], errors, marker="o", markersize=3, label=coupling)
    for value, label in ((0.0, "best of a patch alone"), (1.0, "global optimum")):
        axes.axhline(value, color="black", linewidth=0.8, linestyle="--")
        axes.annotate(label, (LEVELS[0], value), textcoords="offset points", xytext=(0, 3), fontsize=8)
    axes.set(xlabel="noise level u", ylabel="share of the gap closed", ylim=(-0.5, 1.1))
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write(case: Case, rows: list[Row], bounds: Bounds, stem: Path, command: str) -> None:
    """CSV, page and plot."""
    write_rows(stem.with_suffix(".csv"), [asdict(row) for row in rows])
    plot(case, rows, bounds, stem.with_suffix(".png"))
    stem.with_suffix(".md").write_text(report(case, rows, bounds, command) + f"\n![shares]({stem.name}.png)\n")


def run(args: argparse.Namespace, comm: Communicator) -> None:
    """Train, measure, report, one coupling after the other."""
    case, folder = CASES[args.case], args.folder / args.case
    folder.mkdir(parents=True, exist_ok=True)
    write_data(case, folder / "data.h5")
    rows: list[Row] = []
    for label in args.couplings:
        coupling = "two-level" if label == "default" else label
        if coupling not in COUPLINGS:
            raise UserError(f"--couplings: unknown coupling '{label}'{nearest(label, COUPLINGS)}")
        seconds = train(case, coupling, folder / coupling, folder / "data.h5", args.ranks)
        for grid in (case.grid, double(case))[: 2 if coupling == "two-level" and len(case.grid) == 2 else 1]:
            bounds = find_bounds(case, grid, folder / f"bounds-{name(grid)}.json")
            rows += measure(case, coupling, folder / coupling, grid, bounds, seconds, comm)
            print(*rows[-len(LEVELS) :], sep="\n", flush=True)
        bounds = find_bounds(case, case.grid, folder / f"bounds-{args.case}.json")
        stem = RESULTS / f"coupling_{args.case}_{os.uname().machine}_{date.today()}"
        options = f"--couplings {' '.join(args.couplings)} --ranks {args.ranks}"
        write(case, rows, bounds, stem, f"python benchmarks/coupling.py {args.case} {options}")


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    everything = ["default" if name == "two-level" else name for name in COUPLINGS]
    parser.add_argument("--couplings", nargs="+", default=everything, help=f"some of {' '.join(everything)} (default all)")
    parser.add_argument("--folder", type=Path, default=Path("runs/coupling"), help="of the runs (default %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="default %(default)s")
    args = parser.parse_args()
    sys.exit(guard(lambda comm: run(args, comm)))


if __name__ == "__main__":
    main()
