"""How much less noise a denoiser is told of than there is (docs/decisions/0017)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LevelScale:
    """λ(σ). At noise level σ the denoiser is told

        σ' = σ / (1 + (λ(σ) - 1) c_in(σ)),   c_in = 1 / sqrt(1 + σ²).

    Trajectories of a trained denoiser lose energy; told of less noise it leaves them more (Li et al., "Alleviating exposure bias
    in diffusion models through sampling with shifted time steps", ICLR 2024), the more the less noise there is beside the data.

    Arguments:
        values: λ at the levels; linear in ln σ between them, and constant beyond.
        levels: Noise levels, ascending, as many as values.
    """

    values: tuple[float, ...] = (1.0,)
    levels: tuple[float, ...] = (1.0,)

    @property
    def mean(self) -> float:
        """The mean of the values."""
        return sum(self.values) / len(self.values)

    def told(self, sigma: float) -> float:
        """σ' at noise level σ > 0."""
        scale = np.interp(math.log(sigma), np.log(self.levels), self.values)
        return sigma / (1 + (float(scale) - 1) / math.sqrt(1 + sigma**2))


EXACT = LevelScale()  # the denoiser is told of the noise that there is
