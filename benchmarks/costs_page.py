"""The page of costs.py: what was fitted, what was predicted, and its plot."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

from hardware import describe
from reports import command, met, table

MOST = 0.15
COARSE = {  # ways to execute the coarse level: execution.coarse, model.coarse_keys
    "replicated": ("replicated", None),
    "sharded": ("sharded", None),
    "sharded, 2³ keys": ("sharded", 2),
}
Row = dict[str, Any]


def report(model: dict[str, float], rows: list[Row], gpus: list[Row], about: str, plotted: str) -> str:
    """The Markdown page."""
    worst = max(abs(row["predicted"] / row["measured"] - 1) for row in rows if not row["fitted"])
    columns = ("grid", "ranks", "measured", "predicted")
    cells = [
        [
            *(f"{row[key]:.3f}" if isinstance(row[key], float) else row[key] for key in columns),
            f"{row['predicted'] / row['measured']:.3f}",
            "fitted" if row["fitted"] else "held out",
        ]
        for row in rows
    ]
    names = ["gpus", "fine", *(f"{coarse}{what}" for coarse in COARSE for what in ("", "_sent", "_total", "_efficiency"))]
    return "\n".join(
        [
            f"# A cost model of a training step, {date.today()}",
            "",
            f"{describe()}. `{command()}`",
            "",
            f"c = {model['constant']:.3g} s, r = {model['rate'] / 1e9:.3g} GFLOP/s, α = {model['latency'] * 1e6:.3g} µs, "
            f"β = {model['bandwidth'] / 1e9:.3g} GB/s; U-Net 32-64-128; seconds.",
            "",
            *table((*columns, "ratio", ""), cells),
            *table(("bar", "found", "met"), [(f"held-out runs within {MOST:.0%}", f"{worst:.1%}", met(worst <= MOST))]),
            "## On GPUs: the model, not a measurement",
            "",
            about,
            "",
            *table([n.replace("_", " ") for n in names], [[f"{row[n]:.3g}" for n in names] for row in gpus]),
            f"![Efficiency]({plotted})",
            "",
        ]
    )


def plot(gpus: list[Row], path: Path) -> None:
    """Predicted efficiency, and the share of the coarse level."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    x = [row["gpus"] for row in gpus]
    for coarse in COARSE:
        left.semilogx(x, [row[f"{coarse}_efficiency"] for row in gpus], base=2, label=f"coarse level {coarse}")
        right.loglog(x, [row[coarse] + row[f"{coarse}_sent"] for row in gpus], label=f"coarse level {coarse}, and communication")
    right.loglog(x, [row["fine"] for row in gpus], label="fine level")
    left.set(xlabel="GPUs", title="predicted efficiency", ylim=(0, 1.05))
    right.set(xlabel="GPUs", title="seconds of a step")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
