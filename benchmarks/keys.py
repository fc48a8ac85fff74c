"""Tokens that attend to means of tokens: what fewer keys cost in samples of turbulence.

    python benchmarks/keys.py --flows isotropic                               # half an hour on two cores; resumes where it was
    python benchmarks/keys.py --flows isotropic --keys 4 2 --seeds 0 --steps 2000    # a quarter of an hour

The small mode of turbulence.py, halo and tokens together: the same flows, networks, training, calibration, sampling and distances
to the reference, for several numbers of keys per axis and patch (`model.coarse_keys`; 4 is every token) and several seeds of the
training, whose losses over the first and the last fifth of the steps are columns too: networks of one seed see the same fields
and noise. The report goes to benchmarks/results/, with the mean over the seeds, and every one.
"""

from __future__ import annotations

import argparse
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

from flows import SMALL, Flow
from hardware import describe
from reports import command, stem, table, write_rows
from turbulence import WORKERS, measure, prepare, train
from turbulence_page import DISTANCES

SCHEME, COUPLING = "halo and tokens", "two-level"
COLUMNS = {"first": "loss at first", "last": "at last", **DISTANCES, "spectrum_error": "spectrum, mean abs ln", "seam_ratio": "J"}
DIGITS = {"first": 4, "last": 4, "spectrum_error": 3, "seam_ratio": 3}
Row = dict[str, Any]


def variant(flow: Flow, keys: int, seed: int, steps: int) -> Flow:
    """The flow with other keys, another seed and longer training."""
    return replace(flow, model={**flow.model, "coarse_keys": keys}, train={**flow.train, "seed": seed, "steps": steps})


def place(folder: Path, keys: int, seed: int, steps: int) -> Path:
    """The folder of a variant, with links to the data of its flow."""
    path = folder / f"keys{keys}-seed{seed}-steps{steps}"
    path.mkdir(exist_ok=True)
    for name in ("data.h5", "reference.h5"):
        if not (path / name).exists():
            (path / name).symlink_to((folder / name).resolve())
    return path


def losses(run: Path, steps: int) -> Row:
    """Means of the logged losses over the first and the last fifth of the steps."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    fifths = {
        "first": [row for row in rows if row["step"] <= 0.2 * steps],
        "last": [row for row in rows if row["step"] > 0.8 * steps],
    }
    return {name: statistics.mean(row["loss"] for row in some) for name, some in fifths.items()}


def run_flow(flow: Flow, folder: Path, keys: list[int], seeds: list[int], steps: int) -> list[Row]:
    """Train all variants, a core each, then draw and compare one after the other."""
    prepare(flow, folder, folder)
    cases = [(variant(flow, k, seed, steps), place(folder, k, seed, steps), k, seed) for seed, k in product(seeds, keys)]
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(lambda case: train(case[0], COUPLING, case[1]), cases))
    return [
        {"keys": k, "seed": seed, **losses(path / COUPLING, steps), **measure(changed, SCHEME, path, path)}
        for changed, path, k, seed in cases
    ]


def report(rows: list[Row], flows: list[str]) -> str:
    """The Markdown page: means over the seeds, with every one."""
    lines = [f"# Keys of the coarse level, {date.today()}", "", f"{describe()}. `{command()}`", ""]
    lines += ["Distances to the reference in units of its noise, as in turbulence.py: mean over the seeds (and of each).", ""]
    for kind in flows:
        of_flow = [row for row in rows if row["flow"] == kind]
        cells = [
            [keys, *(spread([row[name] for row in of_flow if row["keys"] == keys], name) for name in COLUMNS)]
            for keys in dict.fromkeys(row["keys"] for row in of_flow)
        ]
        lines += [f"## {kind}", "", *table(("keys per axis and patch", *COLUMNS.values()), cells)]
    return "\n".join(lines)


def spread(values: list[float], name: str) -> str:
    """Mean, and in brackets all."""
    digits = DIGITS.get(name, 1)
    return f"{statistics.mean(values):.{digits}f} ({', '.join(f'{value:.{digits}f}' for value in values)})"


def main() -> None:
    """Read the arguments, and go through the flows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flows", nargs="+", choices=SMALL, default=list(SMALL))
    parser.add_argument("--keys", nargs="+", type=int, default=[4, 2, 1], help="per axis and patch (default %(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the training (default %(default)s)")
    parser.add_argument("--steps", type=int, help="of the training (default: those of turbulence.py)")
    parser.add_argument("--folder", type=Path, default=Path("runs/keys"), help="of data and runs (default %(default)s)")
    args = parser.parse_args()
    path, rows = stem("-".join(["keys", *args.flows, *([f"steps{args.steps}"] if args.steps else [])])), []
    for kind in args.flows:
        rows += run_flow(SMALL[kind], args.folder / kind, args.keys, args.seeds, args.steps or SMALL[kind].train["steps"])
        write_rows(path.with_suffix(".csv"), rows)
        path.with_suffix(".md").write_text(report(rows, args.flows))
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
