"""The first convolution, on whitened 3^d neighbourhoods.

Physical fields are smooth: on a 3^d stencil almost all variance lies in a few combinations, and at low noise the little that the
denoiser must find, noise in the others, reaches a plain network hundreds of times weaker than the field. Here every combination
has unit variance at every noise level. With the stencil's covariance in the training data, C = V diag(λ) V^T, the kernel is

    K(σ) = W (C + σ² I)^-1/2 = W V diag((λ + σ²)^-1/2) V^T

and W is trained: the same weights for all σ, on stencils that are whitened for each. This square root is a smooth function of C,
whichever basis V is found where a λ is repeated, so that round-off in C does not change the network.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddpatch.model.convolution import CHANNELS_LAST, convolve


class StencilConvolution(nn.Module):
    """Unpadded 3^d convolution with kernel K(σ).

    Arguments:
        ndim: 2 or 3.
        inputs, outputs: Channels.
    """

    values: Tensor
    vectors: Tensor

    def __init__(self, ndim: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.shape = (inputs, *(3,) * ndim)
        size = inputs * 3**ndim
        self.weight = nn.Parameter(torch.randn(outputs, size) / size**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("values", torch.ones(size))
        self.register_buffer("vectors", torch.eye(size))

    def whiten(self, covariance: Tensor) -> None:
        """Take the covariance of the data's stencils, ``[channel 3^d, channel 3^d]``; before it, points count as independent."""
        values, vectors = torch.linalg.eigh(covariance.to(torch.float64))
        self.values.copy_(values.clamp(min=0))
        self.vectors.copy_(vectors)

    def kernels(self, sigma: Tensor) -> Tensor:
        """K(σ) for inputs c_in x, with shapes ``[sample]`` and ``[sample, outputs, inputs, 3, (3,) 3]``."""
        square = sigma.square()[:, None]
        scale = ((1 + square) / (self.values + square)).sqrt()
        return ((self.weight @ self.vectors * scale[:, None]) @ self.vectors.T).unflatten(-1, self.shape)

    def forward(self, windows: Tensor, sigma: Tensor) -> Tensor:
        """Convolve.

        Arguments:
            windows: Shape ``[sample, patch, inputs, *points]``.
            sigma: Shape ``[sample]``.

        Returns:
            Shape ``[sample * patch, outputs, *(points - 2)]``, channels last in memory.
        """
        kernels, last = self.kernels(sigma), CHANNELS_LAST[windows.ndim - 3]
        samples = (x.contiguous(memory_format=last) for x in windows)
        return torch.cat([convolve(x, kernel, self.bias) for x, kernel in zip(samples, kernels, strict=True)])
