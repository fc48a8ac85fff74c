"""The preconditioned denoiser D(x; σ) and its loss (EDM: Karras, Aittala, Aila, Laine, NeurIPS 2022, table 1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddpatch.diffusion.weighting import Weighting, edm

Network = Callable[[Tensor, Tensor], Tensor]


class Denoiser:
    """D(x; σ) = c_skip x + c_out F(c_in x; c_noise), with unit data deviation:

        c_skip = 1 / (σ² + 1),   c_out = σ / sqrt(σ² + 1),   c_in = 1 / sqrt(σ² + 1),   c_noise = ln(σ) / 4.

    F then has inputs and targets of unit variance at every noise level.

    Arguments:
        network: F(x, c_noise): ``[sample, *]`` and ``[sample]`` to ``[sample, *]``.
        weighting: λ(σ) of the loss.
    """

    def __init__(self, network: Network, weighting: Weighting = edm) -> None:
        self.network, self.weighting = network, weighting

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Estimate E[x_0 | x].

        Arguments:
            x: Noisy data, with shape ``[sample, *]``.
            sigma: One noise level per sample, with shape ``[sample]``.
        """
        s = sigma.to(x.dtype)
        wide = s.view(-1, *(1,) * (x.ndim - 1))
        scale = (wide.square() + 1).rsqrt()
        output = self.network(x * scale, s.log() / 4)
        return torch.addcmul(x * scale.square(), wide * scale, output)

    def loss(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Weighted squared errors λ(σ) (D(x + σ n; σ) - x)².

        Arguments:
            clean, noise: x and n, with shape ``[sample, *]``.
            sigma: Shape ``[sample]``.

        Returns:
            Shape ``[sample, *]``: not reduced, since only the caller knows how many elements there are in all.
        """
        wide, weight = (s.to(clean.dtype).view(-1, *(1,) * (clean.ndim - 1)) for s in (sigma, self.weighting(sigma)))
        return weight * (self(clean + wide * noise, sigma) - clean).square()


def detached_sum(losses: Tensor) -> Tensor:
    """Sum in double precision, for reports: never differentiated."""
    return losses.detach().to(torch.float64).sum()
