"""Couplings on turbulence: equal parameters, equal training, side by side.

    python benchmarks/turbulence.py              # small: about half an hour on two cores; resumes where it was
    python benchmarks/turbulence.py --full       # for a GPU: larger fields, wider networks, longer training

Two flows: two-dimensional Kolmogorov flow on 16 patches, forced isotropic turbulence on 8 patches. Schemes: one U-Net on the
whole domain; independent patches; overlapping windows whose predictions are averaged at every step (MultiDiffusion); independent
patches whose tiling moves at every step (PaDIS); halo only; tokens only; both. MultiDiffusion and PaDIS sample with the network
of the independent patches. Where patches are coupled the tiling moves too, as it does by default; "fixed tiling" is without, and
"lagged" is fixed tiling with a coarse level that speaks of the evaluation before, at the same level scale. Where there is no
transformer the coarsest level is wider for it. Every network is calibrated (ddpatch calibrate) with a quarter as many samples as
are drawn, on the training data; where no level scale mends the energy, and for overlapping windows, it is 1. "ln E, λ = 1" is
the mean over the resolved shells of ln(E_gen / E_data) before that.
The first row is that of the training data themselves: what no sampler can be expected to beat.

Figures are distances to an independent reference in units of the noise floor, that is of the distance between two halves of the
reference (ddpatch evaluate), and the mean |ln(E_gen / E_ref)| over the resolved shells itself. The seam ratio J is given itself:
1 is perfect, also where the borders of the reference lie at fixed phases of its force and its own J differs from 1, since
training shifts the origin at random.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml
from hardware import describe
from launch import launch
from reports import met, stem, write_rows
from torch import Tensor

from ddpatch.calibration import CALIBRATION, read_calibration
from ddpatch.couplings import COUPLINGS
from ddpatch.decomposition import Decomposition
from ddpatch.diffusion.solvers import Denoise
from ddpatch.io.volume import write_volume
from ddpatch.log import peak_memory
from ddpatch.model.patches import cut, join
from ddpatch.model.two_level import count_parameters
from ddpatch.parallel.comm import Communicator
from ddpatch.sample import Sampler
from ddpatch.sample import sample as sample_verb

WORKERS = 1 if torch.cuda.is_available() else min(2, len(os.sched_getaffinity(0)))  # trainings at a time, and ranks of a sampling
SCHEMES = {  # name: (coupling of the network, how it is sampled)
    "full domain": ("full-domain", "moving"),
    "independent patches": ("none", "fixed"),
    "overlapping windows": ("none", "overlap"),
    "moving tiling": ("none", "moving"),
    "halo": ("halo", "moving"),
    "tokens": ("tokens", "moving"),
    "halo and tokens": ("two-level", "moving"),
    "halo and tokens, fixed tiling": ("two-level", "fixed"),
    "halo and tokens, lagged": ("two-level", "lagged"),
}
FACTS = ("energy", "level_scale", "seconds", "memory", "bytes", "parameters")  # of a sampling
DISTANCES = {
    "spectrum": "spectrum",
    "structure_function": "S₂",
    "flatness": "flatness",
    "increment_pdf": "increments",
    "divergence": "divergence",
    "across_correlation": "across patches",
}


@dataclass(frozen=True)
class Flow:
    """Data, patches, network and budget.

    ``samples``: of training, of the reference, and drawn. ``uncoupled``: channels that give a network without transformer as many
    parameters. ``viscosity``: ``None`` takes what the grid resolves.
    """

    kind: str
    grid: int
    patch: tuple[int, ...]
    samples: tuple[int, int, int]
    model: dict[str, Any]
    uncoupled: list[int]
    train: dict[str, Any]
    viscosity: float | None = None


NARROW = {"channels": [16, 32, 64], "halo": 4, "token_channels": 16, "coarse_width": 64, "coarse_layers": 3}
WIDE = {"channels": [64, 128, 256], "halo": 4, "token_channels": 32, "coarse_width": 256, "coarse_layers": 6}
SMALL = {
    "kolmogorov": Flow(
        "kolmogorov", 64, (16, 16), (256, 256, 128), NARROW, [16, 32, 88], {"steps": 1500, "batch": 4, "ema": 600.0}, 2e-3
    ),  # the viscosity that 128² points resolve
    "isotropic": Flow("isotropic", 32, (16,) * 3, (64, 64, 64), NARROW, [16, 32, 74], {"steps": 450, "batch": 2, "ema": 100.0}),
}
FULL = {
    "kolmogorov": Flow(
        "kolmogorov", 128, (32, 32), (1024, 256, 128), WIDE, [64, 128, 424], {"steps": 4000, "batch": 16, "ema": 4000.0}
    ),
    "isotropic": Flow(
        "isotropic", 64, (32,) * 3, (256, 64, 32), WIDE, [64, 128, 328], {"steps": 4000, "batch": 4, "ema": 1000.0}
    ),
}


def prepare(flow: Flow, folder: Path) -> None:
    """Data and reference, from different simulations."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, samples, seed in (("data", flow.samples[0], "0"), ("reference", flow.samples[1], "1")):
        if not (folder / f"{name}.h5").exists():
            options = ["--grid", str(flow.grid), "--samples", str(samples), "--seed", seed]
            options += ["--viscosity", str(flow.viscosity)] * (flow.viscosity is not None)
            launch(WORKERS, "-m", "ddpatch", "simulate", flow.kind, *options, "--output", str(folder / f"{name}.h5"))


def train(flow: Flow, coupling: str, folder: Path) -> None:
    """Train the network of one coupling on one rank, or go on with it."""
    run = folder / coupling
    run.mkdir(exist_ok=True)
    tree = {
        "domain": {"patch": list(flow.patch)},
        "data": {"path": str(folder / "data.h5")},
        "model": {**flow.model, "coupling": coupling, **({} if COUPLINGS[coupling].coarse else {"channels": flow.uncoupled})},
        "train": {**flow.train, "warmup": 50},
    }
    (run / "benchmark.yaml").write_text(yaml.safe_dump(tree))
    launch(1, "-m", "ddpatch", "train", str(run / "benchmark.yaml"), "--run", str(run), log=run / "progress.txt")
    if not (run / "calibration.json").exists():
        with suppress(SystemExit):  # patches that show have an energy that no scale mends
            launch(1, "-m", "ddpatch", "calibrate", str(run), "--count", str(flow.samples[2] // 4), log=run / "calibration.txt")


def train_all(flow: Flow, folder: Path) -> None:
    """Train the networks of all schemes, a core each."""
    couplings = dict.fromkeys(coupling for coupling, _ in SCHEMES.values())
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(lambda coupling: train(flow, coupling, folder), couplings))


def worker(run: Path, way: str, count: int, output: Path) -> None:
    """Draw samples and print what it took. Collective."""
    comm = Communicator()
    sampler = Sampler(run, comm)
    scale = 1.0 if way == "overlap" else sampler.noise_scale("dpm++2m", 20)
    comm.bytes.clear()
    start = time.perf_counter()
    if way == "overlap":
        draw_overlapping(sampler, count, output)
    else:
        told = [f"sample.noise_scale={scale}", "sample.lagged=true"] if way == "lagged" else []
        sample_verb(run, output, count, comm, overrides=told, shift=way == "moving", overwrite=True)
    facts = {
        "energy": read_calibration(run / CALIBRATION).get("energy"),
        "level_scale": scale,
        "seconds": (time.perf_counter() - start) / count,
        "memory": max(comm.gather(peak_memory(sampler.device))) / 2**30,
        "bytes": sum(comm.gather(sum(comm.bytes[kind] for kind in ("halo", "allgather", "roll")))) / count * (comm.size > 1),
        "parameters": count_parameters(sampler.model),
    }
    if comm.rank == 0:
        print(json.dumps(facts))


def draw_overlapping(sampler: Sampler, count: int, output: Path) -> None:
    """Sample with windows that overlap by half a patch, on one rank."""
    grid = sampler.decomposition
    sampler.denoise = averaged(sampler.denoise, grid)  # type: ignore[assignment]
    batch = sampler.config.train.batch
    fields = (
        join(patches, grid)[0].numpy()
        for first in range(0, count, batch)
        for patches in sampler.draw(range(first, min(first + batch, count)), 0, "dpm++2m", 20)[:, None].float()
    )
    write_volume(output, sampler.header(count), fields, overwrite=True)


def averaged(denoise: Denoise, grid: Decomposition) -> Denoise:
    """The mean of the predictions in all tilings that are shifted by half a patch."""
    shifts = list(product(*((0, n // 2) for n in grid.patch_shape)))

    def over_tilings(x: Tensor, sigma: Tensor) -> Tensor:
        field, total = join(x, grid), torch.zeros(())
        dims = tuple(range(2, field.ndim))
        for shift in shifts:
            found = join(denoise(cut(field.roll([-s for s in shift], dims), grid), sigma), grid)
            total = total + found.roll(shift, dims) / len(shifts)
        return cut(total, grid)

    return over_tilings


def measure(flow: Flow, scheme: str, folder: Path) -> dict[str, Any]:
    """Sample and evaluate one scheme, once."""
    coupling, way = SCHEMES[scheme]
    stem = scheme.replace(",", "").replace(" ", "-")
    kept = folder / f"{stem}.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    ranks = WORKERS if way != "overlap" and coupling != "full-domain" else 1
    samples, report = folder / f"{stem}.h5", folder / f"{stem}-report"
    command = (__file__, "--worker", str(folder / coupling), way, str(flow.samples[2]), str(samples))
    facts = launch(ranks, *command, threads=WORKERS // ranks).splitlines()[-1]
    row = {"flow": flow.kind, "scheme": scheme, **compare(flow, samples, folder, report), **json.loads(facts)}
    kept.write_text(json.dumps(row))
    return row


def compare(flow: Flow, samples: Path, folder: Path, report: Path) -> dict[str, float]:
    """Distances of a file to the reference."""
    options = ("--patch", *map(str, flow.patch), "--output", str(report), "--overwrite")
    launch(WORKERS, "-m", "ddpatch", "evaluate", str(samples), "--reference", str(folder / "reference.h5"), *options)
    headline = json.loads((report / "metrics.json").read_text())["headline"]
    ratios = {key: headline[key]["ratio"] for key in DISTANCES}
    seams = {"seam_ratio": headline["seam_ratio"]["value"], "reference_seam_ratio": headline["seam_ratio"]["reference"]}
    return {**ratios, "spectrum_error": headline["spectrum"]["value"], **seams}


def measure_data(flow: Flow, folder: Path) -> dict[str, Any]:
    """The row of the training data."""
    found = compare(flow, folder / "data.h5", folder, folder / "data-report")
    return {"flow": flow.kind, "scheme": "the training data", **found, **dict.fromkeys(FACTS)}


def report(rows: list[dict[str, Any]], flows: dict[str, Flow], command: str, label: str) -> str:
    """The Markdown page."""
    lines = [f"# Couplings on turbulence, {label} mode, {date.today()}", "", f"{describe()}. `{command}`", ""]
    for kind in dict.fromkeys(row["flow"] for row in rows):
        lines += section(flows[kind], [row for row in rows if row["flow"] == kind])
    return "\n".join(lines)


def section(flow: Flow, rows: list[dict[str, Any]]) -> list[str]:
    """The table of one flow."""
    columns = [
        *DISTANCES.values(),
        "spectrum, mean abs ln",
        "J",
        "ln E, λ = 1",
        "level scale",
        "parameters",
        "s per sample",
        "GiB per rank",
        "MB sent per sample",
    ]
    return [
        f"## {flow.kind}, {flow.grid}^{len(flow.patch)} points, patches of {'×'.join(map(str, flow.patch))}",
        "",
        f"Model {flow.model}; training {flow.train}, one rank; {flow.samples[2]} samples; {flow.samples[1]} of reference, "
        f"with J {rows[0]['reference_seam_ratio']:.3f}; one seed.",
        "",
        f"| scheme | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
        *(f"| {row['scheme']} | {' | '.join(cells(row))} |" for row in rows),
        "",
        *bars(rows),
        "",
    ]


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table, after its name."""
    ratios = [f"{row[key]:.1f}" for key in DISTANCES]
    found = [f"{row['spectrum_error']:.3f}", f"{row['seam_ratio']:.3f}"]
    if row["parameters"] is None:
        return [*ratios, *found, *[""] * len(FACTS)]
    energy = "" if row["energy"] is None else f"{row['energy']:+.3f}"
    facts = [energy, f"{row['level_scale']:.4f}", str(row["parameters"]), f"{row['seconds']:.2f}", f"{row['memory']:.2f}"]
    return [*ratios, *found, *facts, f"{row['bytes'] / 1e6:.2f}"]


def bars(rows: list[dict[str, Any]]) -> list[str]:
    """What halo and tokens together have to be."""
    by_scheme = {row["scheme"]: row for row in rows}
    if not set(SCHEMES) <= set(by_scheme):
        return []
    both = by_scheme["halo and tokens"]
    parts = [by_scheme[name] for name in ("independent patches", "halo", "tokens")]
    lines = ["| bar | found | met |", "|---|---|---|"]
    for key in ("spectrum", "across_correlation"):
        ahead = min(part[key] for part in parts) - both[key]
        others = ", ".join(f"{part[key]:.1f}" for part in parts)
        text = f"| {DISTANCES[key]}: below independent patches, halo, tokens by 1 | {both[key]:.1f} against {others} |"
        lines.append(f"{text} {met(ahead > 1)} |")
    lines.append(f"| J in [0.97, 1.03] | {both['seam_ratio']:.3f} | {met(0.97 <= both['seam_ratio'] <= 1.03)} |")
    whole = by_scheme["full domain"]["spectrum_error"]
    found = f"{both['spectrum_error']:.3f} against {whole:.3f}"
    verdict = met(both["spectrum_error"] <= 1.1 * whole)
    lines.append(f"| spectrum error within 10 % of the full domain's, or better | {found} | {verdict} |")
    return lines


def main() -> None:
    """Train, sample, evaluate, report, one scheme after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the mode for a GPU")
    parser.add_argument("--flows", nargs="+", choices=SMALL, default=list(SMALL))
    parser.add_argument("--folder", type=Path, default=Path("runs/turbulence"), help="of data and runs (default %(default)s)")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        run, way, count, output = args.worker
        worker(Path(run), way, int(count), Path(output))
        return
    label, flows = ("full", FULL) if args.full else ("small", SMALL)
    flows, rows = {kind: flows[kind] for kind in args.flows}, []
    path = stem(f"turbulence_{label}")
    for kind, flow in flows.items():
        folder = args.folder / label / kind
        prepare(flow, folder)
        train_all(flow, folder)
        rows.append(measure_data(flow, folder))
        for scheme in SCHEMES:
            rows.append(measure(flow, scheme, folder))
            print(rows[-1], flush=True)
            write_rows(path.with_suffix(".csv"), rows)
            command = f"python benchmarks/turbulence.py{' --full' * args.full} --flows {' '.join(args.flows)}"
            path.with_suffix(".md").write_text(report(rows, flows, command, label))


if __name__ == "__main__":
    main()
