"""The preconditioned denoiser D(x; σ) and its loss (EDM: Karras, Aittala, Aila, Laine, NeurIPS 2022, table 1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddpatch.diffusion.weighting import Weighting, edm
from ddpatch.model.groups import Objective

Network = Callable[[Tensor, Tensor], Tensor]
Summed = Callable[[Tensor, Tensor, Objective], Tensor]


class Denoiser:
    """D(x; σ) = c_skip x + c_out F(c_in x; c_noise), with unit data deviation:

        c_skip = 1 / (σ² + 1),   c_out = σ / sqrt(σ² + 1),   c_in = 1 / sqrt(σ² + 1),   c_noise = ln(σ) / 4.

    F then has inputs and targets of unit variance at every noise level.

    Arguments:
        network: F(x, c_noise): ``[sample, *]`` and ``[sample]`` to ``[sample, *]``.
        weighting: λ(σ) of the loss.
        summed: An objective of F(x, c_noise), for a network that need not hold all of its output at once. Default: of all of it.
    """

    def __init__(self, network: Network, weighting: Weighting = edm, summed: Summed | None = None) -> None:
        self.network, self.weighting = network, weighting
        self._summed = summed or (lambda x, noise, objective: objective.number(network(x, noise), *objective.fields))

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Estimate E[x_0 | x].

        Arguments:
            x: Noisy data, with shape ``[sample, *]``.
            sigma: One noise level per sample, with shape ``[sample]``.
        """
        scale, out, noise = self._scales(x, sigma)
        output = self.network(x * scale, noise)
        return torch.addcmul(x * scale.square(), out, output)

    def loss(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Weighted squared errors Σ λ(σ) (D(x + σ n; σ) - x)².

        Arguments:
            clean, noise: x and n, with shape ``[sample, *]``.
            sigma: Shape ``[sample]``.

        Returns:
            The sum over all elements, in double precision: only the caller knows how many elements there are in all.
        """
        weight, (scale, out, noise_level) = _wide(self.weighting(sigma), clean), self._scales(clean, sigma)
        x = torch.addcmul(clean, _wide(sigma, clean), noise) * scale

        def errors(output: Tensor, x: Tensor, clean: Tensor) -> Tensor:
            return (weight * (torch.addcmul(x * scale, out, output) - clean).square()).sum(dtype=torch.float64)

        return self._summed(x, noise_level, Objective(errors, (x, clean)))

    def _scales(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_in, c_out, and c_noise; c_skip is c_in²."""
        s = sigma.to(x.dtype)
        scale = (_wide(s, x).square() + 1).rsqrt()
        return scale, _wide(s, x) * scale, s.log() / 4


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """One value per sample, for every element."""
    return values.to(like.dtype).view(-1, *(1,) * (like.ndim - 1))
