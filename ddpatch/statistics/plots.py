"""The plots of the report. The one module that imports matplotlib, and only when a plot is drawn."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ddpatch.statistics.comparison import Comparison
from ddpatch.statistics.curves import Curves
from ddpatch.statistics.increments import bin_centres

REFERENCE, GENERATED, SEAM = "#3a3a3a", "#0072b2", "#d55e00"
HIGHEST_RATIO = 6.0
STYLE: Any = {
    "figure.dpi": 150,
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "mathtext.fontset": "dejavusans",
}
Side = tuple[Curves, str, str, str]


def draw(plot: Callable[..., Any], *arguments: Any) -> bytes:
    """Draw one of the plots below in the house style; return it as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure = plot(plt, *arguments)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", metadata={"Software": None})
        plt.close(figure)
    return stream.getvalue()


def spectrum(plt: Any, comparison: Comparison) -> Any:
    """E(k) with the band of the reference's samples, and its ratio to the reference."""
    figure, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(5, 4.4), height_ratios=(3, 1.2), layout="constrained")
    ours, theirs, (low, high) = comparison.generated.spectrum, comparison.reference.spectrum, comparison.band
    last = min(len(ours), len(theirs)) - 1
    shown = slice(1, min(last, int(1.15 * comparison.last_shell) + 1) + 1)
    k = np.arange(len(theirs))[shown]
    expected = np.where(theirs[shown] > 0, theirs[shown], np.nan)
    upper.fill_between(k, low[shown], high[shown], color=REFERENCE, alpha=0.18, lw=0, label="reference, range of samples")
    lower.fill_between(k, low[shown] / expected, high[shown] / expected, color=REFERENCE, alpha=0.18, lw=0)
    for axes, unit in ((upper, 1.0), (lower, expected)):
        axes.plot(k, theirs[shown] / unit, color=REFERENCE, label="reference, mean")
        axes.plot(k, ours[shown] / unit, color=GENERATED, ls="--", label="generated, mean")
        axes.axvline(comparison.last_shell + 0.5, color="0.6", lw=0.8, ls=":")
        axes.set_xscale("log")
    upper.set_yscale("log")
    compared = expected[: comparison.last_shell]
    upper.set_ylim(float(np.nanmin(compared)) / 10, float(np.nanmax(compared)) * 5)
    ratio = (ours[shown] / expected)[: comparison.last_shell]
    lower.set_ylim(0.0, max(2.0, min(1.1 * float(np.nanmax(ratio)), HIGHEST_RATIO)))
    upper.set_ylabel("energy $E(k)$ in field units²")
    lower.set_ylabel("ratio to\nreference")
    lower.set_xlabel("wave number $k\\,L/2\\pi$ (dotted: end of the compared range)")
    upper.legend(loc="lower left")
    return figure


def structure(plt: Any, comparison: Comparison) -> Any:
    """Structure functions S2, S3, S4 and the flatness."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3), layout="constrained")
    r = np.array(comparison.plan.distances)
    for curves, colour, line, label in _sides(comparison):
        for order, values in enumerate(curves.structure):
            left.loglog(r, values, line, color=colour, marker="os^"[order], mfc="none", label=label if order == 0 else None)
            if label == "reference":
                left.annotate(f"$S_{order + 2}$", (r[-1], values[-1]), xytext=(6, -3), textcoords="offset points", color=colour)
        right.semilogx(r, curves.flatness, line, color=colour, marker="o", mfc="none", label=label)
    right.axhline(3, color="0.6", lw=0.8, ls=":", label="Gaussian")
    for axes in (left, right):
        _distance_axis(axes, r, "separation $r$ in points")
    longitudinal = "\\delta u_L" if comparison.plan.velocity else "\\delta u"
    left.set_ylabel(f"$S_p(r) = \\langle|{longitudinal}(r)|^p\\rangle$ in field units$^p$")
    right.set_ylabel("flatness $S_4/S_2^2$")
    right.legend()
    left.legend()
    return figure


def densities(plt: Any, comparison: Comparison) -> Any:
    """PDFs of increments, one decade apart, and of the vorticity or the gradient."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.4), layout="constrained")
    plan, reference = comparison.plan, comparison.reference
    picked = [plan.distances.index(r) for r in plan.pdf_distances]
    widths = np.sqrt(reference.structure[0][picked]) / np.array(plan.increment_scales)
    for curves, colour, line, label in _sides(comparison):
        for i, width in enumerate(widths):
            _density(left, curves.increment_pdf[i], float(width), 100.0**-i, line, colour, label if i == 0 else None)
        _density(right, curves.vorticity_pdf, reference.vorticity_rms / plan.vorticity_scale, 1.0, line, colour, label)
    for i, distance in enumerate(plan.pdf_distances):
        text = f"$r$ = {distance}" + (f", × 10$^{{-{2 * i}}}$" if i else "")
        peak = (0, 100.0**-i * float(reference.increment_pdf[i].max()) / 0.2)
        left.annotate(text, peak, fontsize=7, xytext=(0, 6), textcoords="offset points", ha="center")
    swirl = "\\omega" if plan.velocity else "\\partial u"
    left.set_xlabel(f"increment $\\delta u{'_L' if plan.velocity else ''}(r)\\,/\\,\\sigma_\\mathrm{{ref}}$")
    right.set_xlabel(f"{'vorticity' if plan.velocity else 'gradient'} ${swirl}\\,/\\,\\sigma_\\mathrm{{ref}}$")
    for axes in (left, right):
        axes.set_yscale("log")
        axes.set_xlim(-10, 10)
        axes.set_ylabel("probability density")
    right.legend(loc="upper left")
    return figure


def correlation(plt: Any, comparison: Comparison) -> Any:
    """Two-point correlation of pairs within a patch and of pairs in different patches."""
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    r = np.array(comparison.plan.distances)
    for curves, colour, _, label in _sides(comparison):
        axes.plot(r, curves.within, "-", color=colour, marker="o", mfc="none", label=f"{label}, within a patch")
        if comparison.plan.patched:
            axes.plot(r, curves.across, "--", color=colour, marker="s", mfc="none", label=f"{label}, across a border")
    axes.axhline(0, color="0.6", lw=0.8, ls=":")
    _distance_axis(axes, r, "separation $r$ in points")
    axes.set_ylabel("correlation $C(r)$")
    axes.legend()
    return figure


def seam_profile(plt: Any, comparison: Comparison) -> Any:
    """The mean squared jump by position in the patch, per axis, over its mean inside the reference's patches."""
    ndim = comparison.plan.ndim
    figure, panels = plt.subplots(1, ndim, sharey=True, squeeze=False, figsize=(2.4 * ndim + 0.6, 2.8), layout="constrained")
    sides = zip("zyx"[-ndim:], comparison.generated.profiles, comparison.reference.profiles, strict=True)
    for axes, (name, ours, theirs) in zip(panels[0], sides, strict=True):
        unit = np.nanmean(theirs[:-1]) if len(theirs) > 1 else np.nanmean(theirs)
        position = np.arange(len(ours)) + 0.5
        axes.axvspan(len(ours) - 1, len(ours), color=SEAM, alpha=0.15, lw=0, label="patch border")
        axes.plot(position, theirs / unit, color=REFERENCE, marker=".", label="reference")
        axes.plot(position, ours / unit, color=GENERATED, ls="--", marker=".", label="generated")
        axes.set_xlabel(f"position in the patch along ${name}$")
    panels[0][0].set_ylim(0, None)
    panels[0][0].set_ylabel("squared jump / reference")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def slices(plt: Any, comparison: Comparison, reference: Sequence[np.ndarray], generated: Sequence[np.ndarray], label: str) -> Any:
    """Planes of the reference above planes of the samples, on one colour scale; ticks outside mark the patch borders."""
    columns = max(len(reference), len(generated))
    figure, panels = plt.subplots(2, columns, squeeze=False, figsize=(2.3 * columns + 0.8, 4.9), layout="constrained")
    limits = np.percentile(np.concatenate([p.ravel() for p in reference]), [0.5, 99.5])
    signed = limits[0] < 0 < limits[1]
    low, high = (-max(-limits[0], limits[1]), max(-limits[0], limits[1])) if signed else limits
    for row, (name, planes) in zip(panels, (("reference", reference), ("generated", generated)), strict=True):
        for axes, plane in zip(row, planes, strict=False):
            image = axes.imshow(plane, origin="lower", cmap="RdBu_r" if signed else "viridis", vmin=low, vmax=high)
            _patch_ticks(axes, plane.shape, comparison)
        for axes in row[len(planes) :]:
            axes.set_axis_off()
        row[0].set_ylabel(name)
    figure.colorbar(image, ax=panels, shrink=0.6, label=label)
    return figure


def _sides(comparison: Comparison) -> tuple[Side, Side]:
    return (comparison.reference, REFERENCE, "-", "reference"), (comparison.generated, GENERATED, "--", "generated")


def _density(axes: Any, shares: np.ndarray, scale: float, factor: float, line: str, colour: str, label: str | None) -> None:
    centres = bin_centres().numpy()
    inner = slice(1, -1)
    density = shares / (centres[1] - centres[0]) * scale * factor
    axes.plot(centres[inner] / scale, np.where(density > 0, density, np.nan)[inner], line, color=colour, lw=1.1, label=label)


def _distance_axis(axes: Any, distances: np.ndarray, label: str) -> None:
    axes.set_xlabel(label)
    axes.set_xscale("log")
    axes.set_xticks(distances[:: 1 + len(distances) // 8], [str(r) for r in distances[:: 1 + len(distances) // 8]])
    axes.minorticks_off()


def _patch_ticks(axes: Any, shape: tuple[int, ...], comparison: Comparison) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(labelbottom=False, labelleft=False, length=4, width=0.8, color=SEAM, top=True, right=True)
    for axis, points, patch in zip((axes.yaxis, axes.xaxis), shape, comparison.plan.patch[-2:], strict=True):
        axis.set_ticks(np.arange(0, points + 1, patch) - 0.5 if comparison.plan.patched else [])
