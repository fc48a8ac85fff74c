"""From sums to the curves of the report, for any choice of the measured samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ddpatch.statistics import seams
from ddpatch.statistics.measure import Plan, Sums


@dataclass(frozen=True)
class Curves:
    """The statistics of some samples. A number is NaN where it is not defined.

    Attributes:
        spectrum: E(k), with shape ``[shell]``.
        structure: S_p(r) for p = 2, 3, 4, averaged over the axes, with shape ``[p, distance]``.
        flatness: S4 / S2², with shape ``[distance]``.
        skewness: <δu³> / S2^1.5, with shape ``[distance]``.
        increment_pdf: Share of the increments in every bin, with shape ``[pdf distance, bin]``.
        vorticity_pdf: Share of the vorticity (or gradient) in every bin, with shape ``[bin]``.
        within, across: Correlation of pairs within a patch, and of pairs with a patch border between them, with shape
            ``[distance]``.
        patch_correlation: Correlation of the means of neighbouring patches.
        profiles: Mean squared first difference by position in the patch, one ``[position]`` per axis.
        seam_ratio, seam_ratio_2: J and J2, averaged over the axes.
        divergence, spectral_divergence: rms of the divergence over rms of the gradient, by differences and by modes.
        deviation: Root of the variance averaged over the channels.
        vorticity_rms: rms of the vorticity (or of a component of the gradient).
    """

    spectrum: np.ndarray
    structure: np.ndarray
    flatness: np.ndarray
    skewness: np.ndarray
    increment_pdf: np.ndarray
    vorticity_pdf: np.ndarray
    within: np.ndarray
    across: np.ndarray
    patch_correlation: float
    profiles: list[np.ndarray]
    seam_ratio: float
    seam_ratio_2: float
    divergence: float
    spectral_divergence: float
    deviation: float
    vorticity_rms: float


def curves(sums: Sums, plan: Plan, samples: Sequence[int] | None = None) -> Curves:
    """The statistics of some of the measured samples. Default: of all."""
    chosen = {key: value if samples is None else value[list(samples)] for key, value in sums.items()}
    count = len(chosen["energy"])
    total = {key: value.sum(0) for key, value in chosen.items()}
    powers = (total["increments"][..., :4] / total["increments"][..., 4:]).mean(0)
    within, across = _correlation(total["pairs"], plan)
    ratios = _seam_ratios(total["jumps"], plan)
    jumps = [total["jumps"][axis, 0, :p] for axis, p in enumerate(plan.patch)]
    return Curves(
        spectrum=(total["energy"] / count).numpy(),
        structure=powers[:, :3].T.numpy(),
        flatness=(powers[:, 2] / powers[:, 0] ** 2).numpy(),
        skewness=(powers[:, 3] / powers[:, 0] ** 1.5).numpy(),
        increment_pdf=_shares(total["increment_histogram"]),
        vorticity_pdf=_shares(total["vorticity"]),
        within=within,
        across=across,
        patch_correlation=float(seams.pearson(total["neighbours"]).nanmean()),
        profiles=[(jump[:, 0] / jump[:, 1]).numpy() for jump in jumps],
        seam_ratio=float(ratios[0]),
        seam_ratio_2=float(ratios[1]),
        divergence=float((total["slopes"][0] / total["slopes"][1]).sqrt()),
        spectral_divergence=float((total["solenoidal"][0] / total["solenoidal"][1]).sqrt()),
        deviation=float(_variance(total["moments"]).mean().sqrt()),
        vorticity_rms=float((total["vorticity_square"][0] / total["vorticity_square"][1]).sqrt()),
    )


def _shares(counts: Tensor) -> np.ndarray:
    shares: np.ndarray = (counts / counts.sum(-1, keepdim=True).clamp(min=1)).numpy()
    return shares


def _variance(moments: Tensor) -> Tensor:
    return moments[:, 1] / moments[:, 2] - (moments[:, 0] / moments[:, 2]) ** 2


def _correlation(pairs: Tensor, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    if not plan.patched:
        pairs = torch.stack([pairs.sum(2), torch.zeros_like(pairs[:, :, 0])], 2)
    correlation = seams.pearson(pairs).nanmean((0, 3))
    return correlation[:, 0].numpy(), correlation[:, 1].numpy()


def _seam_ratios(jumps: Tensor, plan: Plan) -> Tensor:
    several = [axis for axis, p in enumerate(plan.patch) if float(jumps[axis, 0, p - 1, 1]) > 0]
    if not several or not plan.patched:
        return torch.full((2,), torch.nan)
    return torch.stack([seams.seam_ratios(jumps[axis, :, : plan.patch[axis]]) for axis in several]).nanmean(0)
