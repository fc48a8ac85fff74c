"""Layers that need no neighbour: residual blocks within a patch, and a norm without any reduction over points.

Weights are kept in the type that they are trained in, and used in the type of the features that they meet.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpatch.model.convolution import CONV


class Linear(nn.Linear):
    """A linear map in the type of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., inputs]`` to ``[..., outputs]``."""
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class PointNorm(nn.Module):
    """Layer norm over the channels of every point: y = g (x - mean_c x) / sqrt(var_c x + ε) + b.

    It reduces over nothing but channels, so it is the same whether a point lies in a patch or in the whole field, and leaves
    no seam.

    Arguments:
        channels: Number of channels; dim 1 of the input ``[batch, channel, *points]``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """Normalise every point of ``[sample * patch, channel, *points]``; then y → scale y + shift, if these are given.

        Arguments:
            x: Features.
            scale, shift: Shape ``[sample, channel]``. One sample's become part of the norm, which saves passes over its points.
        """
        return normalise(x.movedim(1, -1), self.gain, self.bias, scale, shift).movedim(-1, 1)


class ResidualBlock(nn.Module):
    """x → skip(x) + conv(silu(norm(conv(silu(norm x))))), with the second norm modulated by the embedding of σ.

    Arguments:
        ndim: 2 or 3.
        inputs, outputs: Channels.
        embedding: Width of the embedding.
        wraps: Whether the points close on themselves; else there are zeros around them.
        shed: Points on every side, 0 or 1, that are not wanted of the result: the last convolution does without padding then.
    """

    def __init__(self, ndim: int, inputs: int, outputs: int, embedding: int, wraps: bool = False, shed: int = 0) -> None:
        super().__init__()
        conv: Any = CONV[ndim]
        beyond = "circular" if wraps else "zeros"
        self.shed = shed
        self.norm1, self.norm2 = PointNorm(inputs), PointNorm(outputs)
        self.conv1 = conv(inputs, outputs, 3, padding=1, padding_mode=beyond)
        self.conv2 = zero(conv(outputs, outputs, 3, padding=1 - shed, padding_mode=beyond))
        self.modulation = Linear(embedding, 2 * outputs)
        self.skip = nn.Identity() if inputs == outputs else conv(inputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map ``[sample * patch, inputs, *points]`` and ``[sample, embedding]`` to
        ``[sample * patch, outputs, *(points - 2 shed)]``.
        """
        scale, shift = self.modulation(embedding).chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h, 1 + scale, shift)))
        return self.skip(crop(x, self.shed)) + h


class Gain(nn.Module):
    """x → (1 + g(σ)) x with one gain per channel, 1 at first.

    Arguments:
        channels: Number of channels.
        embedding: Width of the embedding.
    """

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.gain = Linear(embedding, channels)
        nn.init.zeros_(self.gain.weight)
        nn.init.zeros_(self.gain.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Scale ``[batch, channel, *points]`` by ``[batch, embedding]``."""
        return x * (1 + self.gain(embedding)).view(*x.shape[:2], *(1,) * (x.ndim - 2))

    def scaled(self, conv: nn.Conv2d | nn.Conv3d, embedding: Tensor) -> Tensor:
        """W (1 + g(σ)) of a convolution of one point: gains scale the weights in place of the features.

        Arguments:
            conv: W.
            embedding: Shape ``[sample, embedding]``.

        Returns:
            Shape ``[sample, outputs, channel]``.
        """
        return conv.weight.flatten(1).to(embedding.dtype) * (1 + self.gain(embedding))[:, None]


class NoiseEmbedding(nn.Module):
    """Features of the noise level: a two-layer perceptron on cos and sin of c_noise = ln(σ)/4 at log-spaced frequencies.

    Arguments:
        width: Width of the embedding.
        frequencies: Number of frequencies, from 1 to 64 radians per unit of c_noise.
    """

    frequencies: Tensor

    def __init__(self, width: int, frequencies: int = 16) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(0, math.log10(64), frequencies), persistent=False)
        self.layers = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, noise: Tensor) -> Tensor:
        """Map c_noise, with shape ``[sample]``, to ``[sample, width]``."""
        angles = noise[:, None] * self.frequencies.to(noise.dtype)
        return self.layers(torch.cat([angles.cos(), angles.sin()], dim=1))


def normalise(x: Tensor, gain: Tensor, bias: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """Layer norm over the last dim; then y → scale y + shift, if these are given.

    Arguments:
        x: Shape ``[sample * patch, *points, channel]``.
        gain, bias: Of the norm, with shape ``[channel]``.
        scale, shift: Shape ``[sample, channel]``. One sample's become part of the norm, which saves passes over its points.
    """
    gain, bias = gain.to(x.dtype), bias.to(x.dtype)
    if scale is None or shift is None:
        return F.layer_norm(x, gain.shape, gain, bias)
    if len(scale) == 1:
        return F.layer_norm(x, gain.shape, gain * scale[0], bias * scale[0] + shift[0])
    patches = len(x) // len(scale)
    scale, shift = (v.repeat_interleave(patches, dim=0).view(len(x), *(1,) * (x.ndim - 2), -1) for v in (scale, shift))
    return (F.layer_norm(x, gain.shape, gain, bias) * scale).add_(shift)


def crop(x: Tensor, width: int) -> Tensor:
    """Take ``width`` points off every side of ``[batch, channel, *points]``."""
    return F.pad(x, [-width] * 2 * (x.ndim - 2)) if width else x  # slices would have gradients with channels first


def zero(module: nn.Conv2d | nn.Conv3d) -> nn.Conv2d | nn.Conv3d:
    """A convolution that gives 0 until it is trained."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module
