"""The report: a folder of plots, and one self-contained HTML page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ddpatch.io.volume import replace_when_complete
from ddpatch.statistics import plots
from ddpatch.statistics.comparison import Comparison

GOOD, ACCEPTABLE = 1.5, 3.0
FIGURES = {  # key: (name, what the value is)
    "spectrum": ("Energy spectrum", "mean of |ln E<sub>gen</sub>/E<sub>ref</sub>| over the compared shells"),
    "structure_function": ("Structure function S₂", "mean of |ln S₂,<sub>gen</sub>/S₂,<sub>ref</sub>| over separations"),
    "flatness": ("Flatness of increments", "mean of |ln F<sub>gen</sub>/F<sub>ref</sub>| over separations"),
    "skewness": ("Skewness of increments", "mean absolute difference over separations"),
    "increment_pdf": ("Distribution of increments", "half the L1 distance, 0 equal to 1 disjoint"),
    "vorticity_pdf": ("Distribution of vorticity", "half the L1 distance, 0 equal to 1 disjoint"),
    "across_correlation": ("Correlation across patch borders", "mean absolute difference over separations"),
    "deviation": ("Standard deviation", "of the field, all channels"),
    "divergence": ("Divergence, central differences", "rms of ∇·u over rms of ∇u"),
    "spectral_divergence": ("Divergence, Fourier modes", "rms of k·û over rms of |k||û|"),
    "seam_ratio": ("Seam ratio J", "squared jump across borders over inside, ideal 1"),
    "seam_ratio_2": ("Seam ratio J₂", "the same of second differences, ideal 1"),
    "patch_correlation": ("Correlation of patch means", "of neighbouring patches"),
}
PLOTS = {
    "spectrum": "Energy spectrum, summed over shells and channels. Grey band: range of the reference's samples.",
    "structure": "Structure functions of order 2, 3 and 4 and flatness of the increments, averaged over the axes.",
    "densities": "Probability densities, in units of the reference's standard deviation.",
    "correlation": "Two-point correlation of pairs of points inside one patch, and of pairs with a patch border between them.",
    "seam_profile": "Mean squared jump between neighbours by position in the patch. A seam is a peak in the shaded strip.",
    "slices": "Planes of the first channel: reference above, generated below. Ticks mark the patch borders.",
    "slices_gradient": "The same planes: vorticity of a velocity, or magnitude of a scalar's gradient. Seams show here first.",
}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light; }}
body {{ margin: 0 auto; max-width: 46rem; padding: 2rem 1rem 4rem; font: 1rem/1.5 Charter, "Bitstream Charter", Georgia, serif;
  color: #222; background: #fff; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; font-weight: 600; }}
h2 {{ font-size: 1.15rem; margin: 2.4rem 0 .6rem; font-weight: 600; }}
p, figcaption, td small {{ color: #555; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font: .88rem/1.35 system-ui, sans-serif; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }}
th {{ text-align: left; font-weight: 600; border-bottom: 1.5px solid #222; padding: .3rem .7rem .3rem 0;
  vertical-align: bottom; }}
td {{ border-bottom: 1px solid #ddd; padding: .35rem .7rem .35rem 0; vertical-align: top; }}
.n {{ text-align: right; white-space: nowrap; }}
td small {{ display: block; font-size: .78rem; }}
.good, .acceptable, .off {{ font-weight: 600; }}
.good {{ color: #00664a; }} .acceptable {{ color: #7a5200; }} .off {{ color: #a33c00; }}
figure {{ margin: 1.6rem 0; }} img {{ max-width: 100%; height: auto; display: block; }}
figcaption {{ font-size: .9rem; margin-top: .4rem; }}
</style></head><body>
<h1>{title}</h1>
<p>{summary}</p>
<div class="wide"><table><thead><tr><th>Statistic</th><th class="n">Generated</th><th class="n">Reference</th>
<th class="n">Distance</th><th class="n">Noise floor</th><th class="n">Ratio</th></tr></thead><tbody>
{rows}
</tbody></table></div>
<p>{floor}</p>
{figures}
<h2>What was compared</h2>
<div class="wide"><table><tbody>
{setting}
</tbody></table></div>
<p>{notes}</p>
</body></html>
"""


def summary(metrics: dict[str, Any]) -> str:
    """The headline as a table of text: every figure, the reference's own where it has one, and the noise floor."""
    lines = [f"{'figure':<34}{'generated':>11}{'reference':>11}{'floor':>11}"]
    for key, entry in metrics["headline"].items():
        cells = (entry.get(column) for column in ("value", "reference", "floor"))
        lines.append(f"{FIGURES[key][0]:<34}" + "".join(f"{'' if cell is None else format(cell, '.3g'):>11}" for cell in cells))
    return "\n".join(lines)


def write_report(
    folder: Path,
    metrics: dict[str, Any],
    comparison: Comparison,
    reference: Sequence[np.ndarray],
    generated: Sequence[np.ndarray],
) -> None:
    """Write the plots and ``report.html``, replacing those of an earlier report. On one rank.

    Arguments:
        folder: Where to write.
        metrics: What ``metrics.json`` holds.
        comparison: The curves to draw.
        reference, generated: Planes to show, each with shape ``[channel, y, x]``.
    """
    images = draw_all(comparison, reference, generated)
    for name, image in images.items():
        with replace_when_complete(folder / f"{name}.png", overwrite=True) as temporary:
            temporary.write_bytes(image)
    with replace_when_complete(folder / "report.html", overwrite=True) as temporary:
        temporary.write_text(page(metrics, images), encoding="utf-8")


def draw_all(comparison: Comparison, reference: Sequence[np.ndarray], generated: Sequence[np.ndarray]) -> dict[str, bytes]:
    """All plots as PNG, by name."""
    images = {
        name: plots.draw(plot, comparison)
        for name, plot in (
            ("spectrum", plots.spectrum),
            ("structure", plots.structure),
            ("densities", plots.densities),
            ("correlation", plots.correlation),
        )
    }
    if comparison.plan.patched:
        images["seam_profile"] = plots.draw(plots.seam_profile, comparison)
    velocity, spacing = comparison.plan.velocity, comparison.plan.spacing
    first = [[plane[0] for plane in side] for side in (reference, generated)]
    slopes = [[_slope(plane, spacing, velocity) for plane in side] for side in (reference, generated)]
    images["slices"] = plots.draw(plots.slices, comparison, *first, "first channel in field units")
    label = "vorticity in the plane" if velocity else "gradient magnitude"
    images["slices_gradient"] = plots.draw(plots.slices, comparison, *slopes, f"{label}, field units / length")
    return images


def page(metrics: dict[str, Any], images: dict[str, bytes]) -> str:
    """The HTML page, with the plots inside."""
    setting = metrics["setting"]
    ours, theirs = setting["generated"], setting["reference"]
    title = f"{Path(ours['file']).name} against {Path(theirs['file']).name}"
    return PAGE.format(
        title=escape(title),
        summary=f"{ours['samples']} generated samples on {_times(ours['grid'])} points, {theirs['samples']} reference samples on "
        f"{_times(theirs['grid'])} points.",
        rows="\n".join(_row(key, entry, setting["velocity"]) for key, entry in metrics["headline"].items()),
        floor=escape(_floor_text(theirs["samples"])),
        figures="\n".join(_figure(name, image) for name, image in images.items()),
        setting="\n".join(_setting_row(key, value) for key, value in _setting_items(setting)),
        notes=escape(_notes(setting)),
    )


def _row(key: str, entry: dict[str, Any], velocity: bool) -> str:
    name, meaning = FIGURES[key]
    if key == "vorticity_pdf" and not velocity:
        name = "Distribution of the gradient"
    single = "distance" in entry
    ratio = entry["ratio"]
    grade = "" if ratio is None else "good" if ratio <= GOOD else "acceptable" if ratio <= ACCEPTABLE else "off"
    value, distance = (entry["value"], entry["distance"]) if single else (None, entry["value"])
    cells = [value, entry.get("reference"), distance, entry["floor"]]
    numbers = "".join(f'<td class="n">{_number(cell)}</td>' for cell in cells)
    return f'<tr><td>{name}<small>{meaning}</small></td>{numbers}<td class="n {grade}">{_number(ratio)}</td></tr>'


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    if 1e3 <= abs(value) < 1e4:
        return f"{value:.0f}"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e3 or value == 0 else f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e")


def _floor_text(samples: int) -> str:
    if samples < 2:
        return "The reference has a single sample, so there is no noise floor: whether a distance is large cannot be told."
    return (
        "The noise floor is the same distance between two disjoint halves of the reference, averaged over the ways to halve it. "
        f"A ratio up to {GOOD:g} is as good as the reference can tell, up to {ACCEPTABLE:g} acceptable."
    )


def _notes(setting: dict[str, Any]) -> str:
    notes = [f"Spectra are compared in the shells 1 to {setting['last_shell']}, in multiples of the smallest wave number."]
    if not all(setting["periodic"]):
        notes.append(
            "Axes that are not periodic in both files carry a Hann window in the spectra, for both files alike; the spectral "
            "divergence includes the window's own gradient."
        )
    if setting["reference"]["cut_from"]:
        notes.append("The reference is on a larger grid and was cut into boxes of the samples' size.")
    if setting["patch"] is None:
        notes.append("No patch shape is known, so seams were not looked for.")
    return " ".join(notes)


def _figure(name: str, image: bytes) -> str:
    data = base64.b64encode(image).decode("ascii")
    caption = escape(PLOTS[name])
    return f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'


def _setting_items(setting: dict[str, Any]) -> list[tuple[str, str]]:
    items = []
    for side in ("generated", "reference"):
        source = setting[side]
        cut = f", cut from {_times(source['cut_from'])}" if source["cut_from"] else ""
        size = f"{source['samples']} samples of {_times(source['grid'])}{cut}"
        items.append((side, f"{source['file']}, dataset {source['dataset']}, {size}"))
    items.append(("channels", ", ".join(setting["channels"]) + (" (velocity)" if setting["velocity"] else "")))
    items.append(("patch", _times(setting["patch"]) if setting["patch"] else "none"))
    items.append(("periodic", ", ".join(str(p).lower() for p in setting["periodic"])))
    items.append(("spacing", ", ".join(f"{h:.6g}" for h in setting["spacing"])))
    return items


def _setting_row(key: str, value: str) -> str:
    return f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>"


def _times(shape: Sequence[int]) -> str:
    return " × ".join(str(n) for n in shape)


def _slope(plane: np.ndarray, spacing: Sequence[float], velocity: bool) -> np.ndarray:
    if velocity:
        swirl: np.ndarray = np.gradient(plane[1], spacing[-1], axis=1) - np.gradient(plane[0], spacing[-2], axis=0)
        return swirl
    steepness: np.ndarray = np.hypot(np.gradient(plane[0], spacing[-2], axis=0), np.gradient(plane[0], spacing[-1], axis=1))
    return steepness
