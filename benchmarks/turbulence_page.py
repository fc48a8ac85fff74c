"""The report of turbulence.py: a table for every flow, and whether it holds what it has to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from flows import Flow, samples_of
from hardware import describe
from launch import launch
from reports import command, met, table

GIVEN = "given"  # of samples: not drawn, but data
OURS = "halo and tokens"
SAME = "full domain, same network"
WHOLES = ("full-domain U-Net", SAME)
COUPLED = ("halo", "tokens")
OTHERS = ("independent patches", *COUPLED)  # that it has to be ahead of
MOVING = ", moving tiling"
FACTS = ("energy", "level_scale", "seconds", "memory", "bytes", "parameters")  # of a sampling
DISTANCES = {
    "spectrum": "spectrum",
    "structure_function": "S₂",
    "flatness": "flatness",
    "increment_pdf": "increments",
    "divergence": "divergence",
    "across_correlation": "across patches",
}


def report(rows: list[dict[str, Any]], flows: dict[str, Flow], folder: Path, label: str, drawn: str = "") -> str:
    """The Markdown page; ``drawn`` is the folder of samples in that of a flow."""
    lines = [f"# Couplings on turbulence, {label} mode, {date.today()}", "", f"{describe()}. `{command()}`", ""]
    for kind in dict.fromkeys(row["flow"] for row in rows):
        lines += section(flows[kind], [row for row in rows if row["flow"] == kind], folder / kind / drawn)
    return "\n".join(lines)


def section(flow: Flow, rows: list[dict[str, Any]], folder: Path) -> list[str]:
    """The table of one flow, and its bars."""
    columns = [
        *DISTANCES.values(),
        "spectrum, mean abs ln",
        "J",
        "ln E, λ = 1",
        "mean level scale",
        "parameters",
        "s per sample",
        "GiB per rank",
        "MB sent per sample",
    ]
    return [
        f"## {flow.kind}, {flow.grid}^{len(flow.patch)} points, patches of {'×'.join(map(str, flow.patch))}",
        "",
        f"Model {flow.model}; training {flow.train}, one rank; {flow.samples[3]} samples; {flow.samples[1]} of reference, "
        f"with J {rows[0]['reference_seam_ratio']:.3f}; one training each.",
        "",
        f"| scheme | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
        *(f"| {row['scheme']} | {' | '.join(cells(row))} |" for row in rows),
        "",
        *bars(flow, rows, folder),
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


def bars(flow: Flow, rows: list[dict[str, Any]], folder: Path) -> list[str]:
    """What halo and tokens together have to be, as far as there are rows for it: in either tiling that was drawn."""
    known = {row["scheme"]: row for row in rows}
    found = [
        (name, *bar)
        for name, tiling in (("fixed", ""), ("moving", MOVING))
        if OURS + tiling in known
        for bar in bars_of(flow, tiling, known, folder)
    ]
    return table(("tiling", "bar", "found", "met"), found) if found else []


def bars_of(flow: Flow, tiling: str, known: dict[str, dict[str, Any]], folder: Path) -> list[tuple[str, str, str]]:
    """The bars of one tiling: what they ask, what was found, and whether it holds; one patch has no tiling."""
    mine = OURS + tiling
    rivals = [scheme + tiling if scheme in COUPLED else scheme for scheme in OTHERS]
    leads = ahead(flow, mine, [scheme for scheme in (*rivals, *WHOLES) if scheme in known], folder)
    found = [of_lead(scheme.removesuffix(MOVING), *lead[1:]) for lead in leads if (scheme := lead[0]) not in WHOLES]
    ratio = known[mine]["seam_ratio"]
    found.append(("J in [0.97, 1.03]", f"{ratio:.3f}", met(0.97 <= ratio <= 1.03)))
    for scheme, _, value, error in [lead for lead in leads if lead[0] in WHOLES and lead[1] == "spectrum"]:
        own, whole = (known[each]["spectrum_error"] for each in (mine, scheme))
        text = f"{own:.3f} against {whole:.3f}, ahead by {value:.2f} ± {error:.2f} floors"
        found.append((f"spectrum error within 10 % of that of {scheme}, or better", text, met(own <= 1.1 * whole)))
    return found


def of_lead(scheme: str, key: str, value: float, error: float) -> tuple[str, str, str]:
    """A bar: halo and tokens is ahead of a scheme."""
    return f"{DISTANCES[key]}: ahead of {scheme}, beyond noise", f"by {value:.2f} ± {error:.2f} floors", met(value > 2 * error)


def ahead(flow: Flow, mine: str, others: Sequence[str], folder: Path) -> list[tuple[str, str, float, float]]:
    """Other schemes, distances, and the lead of one with its standard error (ahead.py)."""
    if not others:
        return []
    files = [folder / "reference.h5", *(samples_of(scheme, folder) for scheme in (mine, *others))]
    script = str(Path(__file__).with_name("ahead.py"))
    printed = launch(2, script, *map(str, files), "--patch", *map(str, flow.patch))
    leads = json.loads(printed.splitlines()[-1])
    return [(scheme, key, *lead) for scheme, of in zip(others, leads, strict=True) for key, lead in of.items()]
