"""Two sets of curves against each other: distances, the noise floor of every distance, and the headline figures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from ddpatch.decomposition import block_range
from ddpatch.statistics.curves import Curves, curves
from ddpatch.statistics.increments import bin_centres
from ddpatch.statistics.measure import Plan, Sums

NUMBERS = ("deviation", "divergence", "spectral_divergence", "seam_ratio", "seam_ratio_2", "patch_correlation")
VELOCITY_ONLY = ("divergence", "spectral_divergence")
PATCHED_ONLY = ("seam_ratio", "seam_ratio_2", "across_correlation", "patch_correlation")
GROUPS = 8


@dataclass(frozen=True)
class Comparison:
    """The samples against the reference.

    Arguments:
        plan: What was measured.
        generated, reference: The curves of the two files.
        band: Smallest and largest E(k) over the samples of the reference, with shape ``[2, shell]``.
        last_shell: The last shell that is compared.
        floor: Distances between halves of the reference; ``None`` where it has a single sample.
    """

    plan: Plan
    generated: Curves
    reference: Curves
    band: np.ndarray
    last_shell: int
    floor: dict[str, float] | None

    def headline(self) -> dict[str, dict[str, float | None]]:
        """The figures of the report: for each its value, the noise floor, and the distance in units of the floor.

        The value is the distance between samples and reference or, where the statistic is a single number, the number of the
        samples; the number of the reference and the distance then stand beside it. ``None`` where a figure is not defined.
        """
        found = distances(self.generated, self.reference, self.last_shell)
        hidden = (() if self.plan.velocity else VELOCITY_ONLY) + (() if self.plan.patched else PATCHED_ONLY)
        return {key: self._entry(key, distance) for key, distance in found.items() if key not in hidden}

    def _entry(self, key: str, distance: float) -> dict[str, float | None]:
        floor = self.floor[key] if self.floor else math.nan
        entry = {"value": distance, "floor": floor, "ratio": distance / floor if floor > 0 else math.nan}
        if key in NUMBERS:
            entry |= {"value": getattr(self.generated, key), "reference": getattr(self.reference, key), "distance": distance}
        return {name: defined(value) for name, value in entry.items()}

    def as_dict(self) -> dict[str, Any]:
        """The headline and all curves, as what JSON can hold."""
        axes = {
            "wave_number_unit": self.plan.unit,
            "distances": list(self.plan.distances),
            "pdf_distances": list(self.plan.pdf_distances),
            "bins": bin_centres().tolist(),
            "increment_scales": list(self.plan.increment_scales),
            "vorticity_scale": self.plan.vorticity_scale,
            "reference_band": defined(self.band),
        }
        sides = {
            side: {key: defined(value) for key, value in vars(getattr(self, side)).items()} for side in ("generated", "reference")
        }
        return {"headline": self.headline(), "axes": axes, **sides}


def compare(generated: Sums, reference: Sums, plan: Plan, last_shell: int) -> Comparison:
    """Compare what was measured on the samples and on the reference."""
    energy = reference["energy"]
    band = np.stack([energy.min(0).values.numpy(), energy.max(0).values.numpy()])
    floor = floors(reference, plan, last_shell)
    return Comparison(plan, curves(generated, plan), curves(reference, plan), band, last_shell, floor)


def distances(a: Curves, b: Curves, last_shell: int) -> dict[str, float]:
    """How far two sets of curves are apart; NaN where a distance is not defined.

    Spectrum, S2 and flatness: mean of |ln(a / b)| over the shells 1 to ``last_shell``, or over the separations. Skewness and
    correlation across patches: mean of |a - b| over the separations. Histograms: half the sum of |a - b| over the bins, which is
    0 for equal and 1 for disjoint ones, averaged over the separations. Single numbers: |a - b|.
    """
    shells = slice(1, last_shell + 1)
    return {
        "spectrum": _log_distance(a.spectrum[shells], b.spectrum[shells]),
        "structure_function": _log_distance(a.structure[0], b.structure[0]),
        "flatness": _log_distance(a.flatness, b.flatness),
        "skewness": _mean(np.abs(a.skewness - b.skewness)),
        "increment_pdf": _mean(np.abs(a.increment_pdf - b.increment_pdf).sum(-1) / 2),
        "vorticity_pdf": _mean(np.abs(a.vorticity_pdf - b.vorticity_pdf).sum(-1) / 2),
        "across_correlation": _mean(np.abs(a.across - b.across)),
        **{key: abs(getattr(a, key) - getattr(b, key)) for key in NUMBERS},
    }


def floors(sums: Sums, plan: Plan, last_shell: int) -> dict[str, float] | None:
    """The distances between disjoint halves of the reference, averaged over :func:`halves`; ``None`` for a single sample."""
    count = len(sums["energy"])
    found = [distances(curves(sums, plan, a), curves(sums, plan, b), last_shell) for a, b in halves(count)]
    return {key: float(np.mean([item[key] for item in found])) for key in found[0]} if found else None


def halves(count: int) -> Iterator[tuple[list[int], list[int]]]:
    """The ways to cut samples into two halves: up to 8 groups of neighbouring samples, half of the groups against the others.

    Neighbours stay together because successive snapshots of one simulation resemble each other.
    """
    size = min(GROUPS, count - count % 2)
    groups = [list(block_range(count, size, i)) for i in range(size)]
    for chosen in combinations(range(size), size // 2):
        if chosen and chosen[0] == 0:
            rest = [i for i in range(size) if i not in chosen]
            yield [n for i in chosen for n in groups[i]], [n for i in rest for n in groups[i]]


def resolved_shells(spectrum: np.ndarray, nyquist: float, k_max: float | None) -> int:
    """The last shell that is compared: ``k_max``, or the last one with more than 1e-8 of the largest energy, up to Nyquist."""
    energetic = np.flatnonzero(spectrum > 1e-8 * spectrum[1:].max(initial=0.0))
    last = float(energetic[-1]) if k_max is None and len(energetic) else k_max or 1.0
    return max(1, min(int(last + 1e-9), int(nyquist + 1e-9), len(spectrum) - 1))


def _log_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean of |ln(a / b)| where b is positive; infinite where a vanishes there."""
    length = min(len(a), len(b))
    a, b = a[:length], b[:length]
    positive = b > 0
    with np.errstate(divide="ignore"):
        return _mean(np.abs(np.log(a[positive] / b[positive])))


def _mean(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")


def defined(value: Any) -> Any:
    """A number, array or list for JSON: what is not finite becomes ``None``."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list):
        return [defined(item) for item in value]
    return value if math.isfinite(value) else None
