"""Noise levels: which are trained, which a sampler visits, and how their range follows from the data.

The process is x_σ = x + σ n with white unit noise n per point. Noise levels are in units of the normalised data's standard
deviation. Karras, Aittala, Aila, Laine, NeurIPS 2022 (EDM).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_FACTOR, MIN_FACTOR, ROUND_OFF = 8.0, 0.3, 1e-5


@dataclass(frozen=True)
class Schedule:
    """The range [σ_min, σ_max], trained log-uniformly, and sampled in N steps at

        σ_i = (σ_max^(1/ρ) + i/(N-1) (σ_min^(1/ρ) - σ_max^(1/ρ)))^ρ,   i = 0 .. N-1,   σ_N = 0.

    Arguments:
        sigma_min, sigma_max: The range.
        rho: Exponent ρ: larger values put more steps at low noise.
    """

    sigma_min: float
    sigma_max: float
    rho: float = 7.0

    def training(self, uniform: float, batch: int) -> Tensor:
        """Log-uniform noise levels of a batch, stratified: the same random offset in each of ``batch`` equal strata.

        Arguments:
            uniform: A random number in [0, 1).
            batch: Number of samples.

        Returns:
            Noise levels with shape ``[sample]``, float64.
        """
        quantile = (torch.arange(batch, dtype=torch.float64) + uniform) / batch
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** quantile

    def steps(self, count: int) -> Tensor:
        """The ``count`` + 1 noise levels of a sampler, from σ_max down to σ_min and then 0, float64."""
        ramp = torch.linspace(0, 1, count, dtype=torch.float64) if count > 1 else torch.zeros(1, dtype=torch.float64)
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return torch.cat([(high + ramp * (low - high)) ** self.rho, torch.zeros(1, dtype=torch.float64)])


def sigma_range(deviation: Tensor, last_shell: int) -> tuple[float, float]:
    """The range of noise levels that the data need.

    In orthonormal Fourier coordinates white noise has standard deviation σ in every mode, and the data has s_k in shell k. At
    σ_max every mode must be drowned, at σ_min every resolved mode must stand out:

        σ_max = 8 max_k s_k,   k = 0 .. last_shell,   σ_min = 0.3 min_k s_k,   k = 1 .. last_shell,

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
