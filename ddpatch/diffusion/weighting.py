"""How errors at different noise levels are weighed against each other in the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpatch.tables import keep

Weighting = Callable[[Tensor], Tensor]


def edm(sigma: Tensor) -> Tensor:
    """λ(σ) = (σ² + 1) / σ²: the squared error of F counts, which has unit variance at every noise level (EDM)."""
    return (sigma.square() + 1) / sigma.square()


@dataclass(frozen=True)
class RelativeError:
    """λ(σ) = 1 / W(σ): errors count relative to those of the exact linear (Wiener) denoiser of the data's spectrum,

        W(σ) = Σ_k n_k s_k² σ² / (s_k² + σ²) / Σ_k n_k,

    so that a loss of 1 is that denoiser's. At high noise little can be predicted and every error is large, at middle noise
    almost everything can. Weighing by what is attainable gives all levels a like share of the gradient, as the learned weight of
    EDM2 does (Karras et al., CVPR 2024).

    Arguments:
        deviation: s_k, standard deviation of an orthonormal Fourier mode of the normalised data, per shell.
        modes: n_k, modes per shell.
    """

    deviation: Sequence[float]
    modes: Sequence[float]

    def __call__(self, sigma: Tensor) -> Tensor:
        """λ(σ) for noise levels ``[sample]``."""
        power, modes = (_values(tuple(v), sigma.dtype, sigma.device) for v in (self.deviation, self.modes))
        square = sigma.square()[:, None]
        return modes.sum() / (modes * power.square() * square / (power.square() + square)).sum(1)


@keep
def _values(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)
