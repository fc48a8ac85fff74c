"""Whether halo and tokens together hold their bars in several trainings, and not in one only.

    python benchmarks/trainings.py --seeds 0 1 2 3 4
    python benchmarks/trainings.py --seeds 0 1 2 3 4 --moving     # tiling, in both

Trains, draws and compares as turbulence.py does, for every seed, with the scheme that is nearest and with our network on the full
domain; resumes where it was. Seeds differ in initial weights, order and noise of the training, and noise of the samples; data and
reference are the same. The report has the leads of every training (ahead.py), their mean, and half of its 95 % confidence
interval (Student's t, of the trainings): what is ahead by more than that is so whatever one training finds by chance. The same of
the ratio of the spectrum error to that of the full domain.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from ahead import KEYS
from flows import SMALL
from hardware import describe
from reports import command, met, stem, table, write_rows
from turbulence import draw_all, prepare, told, train_all
from turbulence_page import DISTANCES, MOVING, OURS, SAME, ahead

OTHER = "tokens"  # the scheme that is nearest
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # two-sided, 95 %, by degrees of freedom
Row = dict[str, Any]


def measure(kind: str, seed: int, folder: Path, tiling: str) -> Row:
    """One training of the three schemes: the leads with their errors, J, and the spectrum errors."""
    mine, other = OURS + tiling, OTHER + tiling
    flow, place = told(SMALL[kind], seed, None), folder / ("small" + f"-seed{seed}" * bool(seed))
    prepare(flow, place / kind, place / kind)
    train_all({kind: flow}, (mine, other, SAME), place)
    _, ours, _, whole = draw_all(flow, (mine, other, SAME), place / kind, place / kind)
    leads = {key: lead for _, key, *lead in ahead(flow, mine, (other,), place / kind)}
    found = {f"{key}{part}": value for key, lead in leads.items() for part, value in zip(("", "_error"), lead, strict=True)}
    errors = {"mean_abs_ln": ours["spectrum_error"], "mean_abs_ln_whole": whole["spectrum_error"]}
    return {"seed": seed, **found, "seam_ratio": ours["seam_ratio"], **errors}


def half_width(values: Sequence[float]) -> float:
    """Of the 95 % confidence interval of the mean."""
    return STUDENT[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))


def report(kind: str, rows: list[Row], tiling: str) -> str:
    """The Markdown page."""
    cells = [
        (
            row["seed"],
            *(f"{row[key]:.2f} ± {row[f'{key}_error']:.2f}" for key in KEYS),
            *(f"{row[key]:.3f}" for key in ("seam_ratio", "mean_abs_ln", "mean_abs_ln_whole")),
        )
        for row in rows
    ]
    header = ("seed of the training", *(DISTANCES[key] for key in KEYS), "J", "spectrum, mean abs ln", "of the full domain")
    bars = [bar([row[key] for row in rows], DISTANCES[key]) for key in KEYS]
    return "\n".join(
        [
            f"# {OURS.capitalize()} against {OTHER} in {len(rows)} trainings{tiling}, {kind}, {date.today()}",
            "",
            f"{describe()}. `{command()}`",
            "",
            "Leads in floors, with the standard error of each; means with half of their 95 % confidence intervals.",
            "",
            *table(header, cells),
            *table(("bar", "mean of the trainings", "met"), [*bars, bar_of_whole(rows)]),
        ]
    )


def bar(leads: list[float], name: str) -> tuple[str, str, str]:
    """What the trainings together have to show."""
    mean, width = statistics.fmean(leads), half_width(leads)
    return f"{name}: ahead of {OTHER}", f"by {mean:.2f} ± {width:.2f} floors", met(mean > width)


def bar_of_whole(rows: list[Row]) -> tuple[str, str, str]:
    """The spectrum error against that of the full domain."""
    ratios = [row["mean_abs_ln"] / row["mean_abs_ln_whole"] for row in rows]
    mean = statistics.fmean(ratios)
    return (
        "spectrum error within 10 % of the full domain's, or better",
        f"{mean:.2f} ± {half_width(ratios):.2f} of it",
        met(mean <= 1.1),
    )


def main() -> None:
    """Train, draw and compare for every seed; report after each from the second on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="two to ten (default 0 to 4)")
    parser.add_argument("--flow", choices=SMALL, default="kolmogorov")
    parser.add_argument("--moving", action="store_true", help="tiling, in place of one that stands still")
    parser.add_argument("--folder", type=Path, default=Path("runs/turbulence"), help="of data and runs (default %(default)s)")
    args = parser.parse_args()
    rows: list[Row] = []
    tiling = MOVING if args.moving else ""
    path = stem(f"trainings_{args.flow}{'-moving' * args.moving}")
    for seed in args.seeds:
        rows.append(measure(args.flow, seed, args.folder, tiling))
        print(rows[-1], flush=True)
        if len(rows) > 1:
            write_rows(path.with_suffix(".csv"), rows)
            path.with_suffix(".md").write_text(report(args.flow, rows, tiling))


if __name__ == "__main__":
    main()
