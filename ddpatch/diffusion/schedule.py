"""Noise levels: which are trained, which a sampler visits, and how their range follows from the data.

The process is x_σ = x + σ n with white unit noise n per point. Noise levels are in units of the normalised data's standard
deviation, as in EDM (Karras, Aittala, Aila, Laine, NeurIPS 2022), but range and steps follow the spectrum of the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MAX_FACTOR, MIN_FACTOR, ROUND_OFF = 8.0, 0.15, 1e-5
EVEN, NODES = 0.1, 1001  # of the distribution of trained noise levels


@dataclass(frozen=True)
class Schedule:
    """The range [σ_min, σ_max], sampled in N steps at

        σ_i = σ_max (σ_min / σ_max)^(i/(N-1)),   i = 0 .. N-1,   σ_N = 0,

    so that every shell of the data's spectrum emerges from noise in as many steps (docs/decisions/0019), and trained with a
    density of ln σ that has as much for every shell, where it emerges:

        p(ln σ) = 0.9 Σ_k W_k (1 - W_k) / Z + 0.1 / ln(σ_max / σ_min),   W_k = s_k² / (s_k² + σ²),   σ_min ≤ s_k ≤ σ_max,

    W_k being the share of shell k that the linear denoiser keeps: where it is 0 or 1, no network has anything to add. Without
    shells the density is uniform.

    Arguments:
        sigma_min, sigma_max: The range.
        deviation: s_k for k = 1, 2, ..., standard deviations of an orthonormal Fourier mode of the normalised data.
    """

    sigma_min: float
    sigma_max: float
    deviation: tuple[float, ...] = ()

    def training(self, uniform: float, batch: int) -> Tensor:
        """Noise levels of a batch, stratified: the same random offset in each of ``batch`` equally probable strata.

        Arguments:
            uniform: A random number in [0, 1).
            batch: Number of samples.

        Returns:
            Noise levels with shape ``[sample]``, float64.
        """
        return torch.from_numpy(np.exp(np.interp((np.arange(batch) + uniform) / batch, *_quantiles(self))))

    def steps(self, count: int) -> Tensor:
        """The ``count`` + 1 noise levels of a sampler, from σ_max down to σ_min and then 0, float64."""
        ramp = torch.linspace(0, 1, count, dtype=torch.float64) if count > 1 else torch.zeros(1, dtype=torch.float64)
        return torch.cat([self.sigma_max * (self.sigma_min / self.sigma_max) ** ramp, torch.zeros(1, dtype=torch.float64)])


@lru_cache(4)
def _quantiles(schedule: Schedule) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The distribution function of the trained ln σ, and ln σ, at :data:`NODES` points."""
    level = np.linspace(math.log(schedule.sigma_min), math.log(schedule.sigma_max), NODES)
    shells = np.array([s for s in schedule.deviation if schedule.sigma_min <= s <= schedule.sigma_max])
    kept = 1 / (1 + (np.exp(level)[:, None] / shells) ** 2)
    density, even = (kept * (1 - kept)).sum(1), np.linspace(0, 1, NODES)
    if not len(shells):
        return even, level
    below = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return EVEN * even + (1 - EVEN) * below / below[-1], level


def sigma_range(deviation: Tensor, last_shell: int) -> tuple[float, float]:
    """The range of noise levels that the data need.

    In orthonormal Fourier coordinates white noise has standard deviation σ in every mode, and the data has s_k in shell k. At
    σ_max every mode must be drowned, at σ_min every resolved mode must stand out, since the step from there to 0 takes the part
    σ_min² / s_k² of a shell's energy:

        σ_max = 8 max_k s_k,   k = 0 .. last_shell,   σ_min = 0.15 min_k s_k,   k = 1 .. last_shell,

    except for shells below 1e-5 of the largest, where single-precision data hold round-off.

    Arguments:
        deviation: s_k of the normalised data, with shape ``[shell]``.
        last_shell: The largest wave number that the data resolve.
    """
    largest, shells = float(deviation[: last_shell + 1].max()), deviation[1 : last_shell + 1]
    return MIN_FACTOR * float(shells[shells > ROUND_OFF * largest].min()), MAX_FACTOR * largest


def log_snr(sigma: float) -> float:
    """λ = -ln σ, the half log signal-to-noise ratio of unit data; infinite at σ = 0."""
    return -math.log(sigma) if sigma > 0 else math.inf
