"""Periodic Gaussian random fields of a given spectrum: data of which everything is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ddpatch.errors import UserError


@dataclass(frozen=True)
class PowerLaw:
    """The isotropic spectrum S(k) ∝ (1 + (k / k_0)²)^-p, with k in multiples of the grid's smallest wave number.

    Arguments:
        knee: k_0, where the flat part ends.
        exponent: p; far beyond the knee S falls as k^-2p.

    Raises:
        UserError: if a value is not positive.
    """

    knee: float = 2.0
    exponent: float = 2.0

    def __post_init__(self) -> None:
        for name in ("knee", "exponent"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"spectrum: {name} {getattr(self, name)}, expected a positive number")

    def power(self, shape: Sequence[int], fundamental: float = 1.0) -> Tensor:
        """Variance of every orthonormal Fourier mode of a field of unit variance, with shape ``[*grid]``, float64.

        Arguments:
            shape: Points of the grid.
            fundamental: The grid's smallest wave number; 1/2 on a grid of twice the length, with twice the points.
        """
        waves = [torch.fft.fftfreq(n, dtype=torch.float64) * n * fundamental for n in shape]
        square = sum((k**2 for k in torch.meshgrid(*waves, indexing="ij")), torch.zeros((), dtype=torch.float64))
        power = (1 + square / self.knee**2) ** -self.exponent
        return power / power.mean()


def draw(power: Tensor, random: np.random.Generator) -> Tensor:
    """One field with the given mode variances, with shape ``[*grid]``, float64.

    x = F^-1 sqrt(S) F n,   n white unit noise.
    """
    noise = torch.from_numpy(random.standard_normal(tuple(power.shape)))
    return torch.fft.ifftn(torch.fft.fftn(noise) * power.sqrt()).real
