"""The page of scaling.py: its table, bars and plot."""

from __future__ import annotations

import argparse
import math
import statistics
from datetime import date
from pathlib import Path
from typing import Any

from hardware import describe
from reports import command, listed, met, table
from timing import MEASURED, SPENT, WARM_UP

BAR = 0.95
ABOUT = """\
Seconds of the slowest rank, medians over the steps, then over the rounds; every column has its own slowest rank. coarse: the
transformer over all tokens, which is sharded from 1024 tokens on, and repeated by every rank below, as the optimiser always is.
halo: exchange of halos. gather: of tokens, and its adjoint. sums: of gradients, loss and flags, as
far as the backward pass does not hide them. These three with waiting. I/O: reading the batch; for an evaluation its share of
writing a sample. compute: what is left. page faults: in a step; a thousand are 4 MB that the C library had not kept from
earlier steps. Several jobs run side by side, without knowing of each other, each on a grid of its own."""

Row = dict[str, Any]


def write_page(rows: list[Row], args: argparse.Namespace, path: Path) -> str:
    """Write page and plot; returns the page."""
    joined = medians(rows)
    plot(joined, path.with_suffix(".png"))
    rounds = 1 + max(row["round"] for row in rows)
    text = report(joined, args, rounds, path.with_suffix(".png").name)
    path.with_suffix(".md").write_text(text)
    return text


def medians(rows: list[Row]) -> list[Row]:
    """One row for every verb and number of ranks: the medians over the rounds, and all efficiencies."""
    joined = []
    for kind in dict.fromkeys((row["verb"], row["ranks"], row["jobs"]) for row in rows):
        mine = [row for row in rows if (row["verb"], row["ranks"], row["jobs"]) == kind]
        middle = {key: statistics.median(row[key] for row in mine) for key in (*MEASURED, "efficiency")}
        joined.append({**mine[0], **middle, "efficiencies": [row["efficiency"] for row in mine]})
    return sorted(joined, key=lambda row: (row["verb"] != "train", row["jobs"], row["ranks"]))


def report(rows: list[Row], args: argparse.Namespace, rounds: int, plotted: str) -> str:
    """The Markdown page."""
    named = ("verb", "ranks", "jobs", "nodes", "grid", "patches_per_rank", "threads")
    titles = [key.replace("_", " ").replace("io", "I/O") for key in (*named, *SPENT)]
    cells = [
        [row[key] for key in named]
        + [f"{row[key]:.4f}" for key in (*SPENT, "total")]
        + [
            f"{row['faults']:.0f}",
            f"{row['efficiency']:.3f}",
            listed(row["efficiencies"]),
            "yes" if row["oversubscribed"] else "no",
        ]
        for row in rows
    ]
    lines = [
        f"# {args.mode.capitalize()} scaling, {date.today()}",
        "",
        f"{describe(args.threads)}. `{command()}`",
        "",
        f"U-Net {'-'.join(map(str, args.channels))}, {args.tokens}³ tokens a patch, which attend to {args.keys or args.tokens}³",
        f"of every patch, {'fine level compiled, ' * args.compile}otherwise the defaults;",
        f"patches of {args.patch}³, 3 channels, batch 1; {args.steps} steps after {WARM_UP} that are not counted,",
        f"{rounds} rounds in which all numbers of ranks took turns.",
        ABOUT,
        "",
        *table((*titles, "total", "page faults", "efficiency", "of every round", "oversubscribed"), cells),
        *table(("bar: one to two ranks, one thread each", "found", "met"), bars(rows)),
        f"![Seconds and efficiency]({plotted})",
    ]
    return "\n".join(lines) + "\n"


def bars(rows: list[Row]) -> list[tuple[str, str, str]]:
    """What the efficiency of two ranks has to be."""
    found = {(row["verb"], row["ranks"]): row for row in rows if row["threads"] == row["jobs"] == 1}
    lines = []
    for verb in dict.fromkeys(row["verb"] for row in rows):
        measured = (verb, 1) in found and (verb, 2) in found
        value = found[verb, 2]["efficiency"] if measured else math.nan
        verdict = met(value >= BAR) if measured else "not measured"
        lines.append((f"{verb}: efficiency at least {BAR}", f"{value:.3f}", verdict))
    return lines


def plot(rows: list[Row], path: Path) -> None:
    """Seconds by what they went to, and efficiency, over ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    verbs = list(dict.fromkeys(row["verb"] for row in rows))
    figure, axes = pyplot.subplots(1, len(verbs) + 1, figsize=(4 * len(verbs) + 4, 3.6), layout="constrained")
    for verb, left in zip(verbs, axes, strict=False):
        mine = [row for row in rows if row["verb"] == verb and row["jobs"] == 1]
        ranks, floor = [str(row["ranks"]) for row in mine], [0.0] * len(mine)
        for name in SPENT:
            left.bar(ranks, [row[name] for row in mine], bottom=floor, label=name)
            floor = [below + row[name] for below, row in zip(floor, mine, strict=True)]
        left.set(title=verb, xlabel="ranks", ylabel="s")
        axes[-1].plot(ranks, [row["efficiency"] for row in mine], label=verb)
        for n, row in zip(ranks, mine, strict=True):
            axes[-1].plot([n] * len(row["efficiencies"]), row["efficiencies"], ".", color=axes[-1].lines[-1].get_color())
    axes[0].legend(fontsize=8)
    axes[-1].axhline(1.0, color="black", linewidth=0.8, linestyle="--")
    axes[-1].set(title="efficiency", xlabel="ranks", ylim=(0, None))
    axes[-1].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
