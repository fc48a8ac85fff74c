"""Layers that need no neighbour: residual blocks within a patch, and a norm without any reduction over points.

Weights are kept in the type that they are trained in, and used in the type of the features that they meet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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

    def forward(self, x: Tensor) -> Tensor:
        """Normalise every point of ``[batch, channel, *points]``."""
        gain, bias = self.gain.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x.movedim(1, -1), gain.shape, gain, bias).movedim(-1, 1)


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
        """Map ``[batch, inputs, *points]`` and ``[batch, embedding]`` to ``[batch, outputs, *(points - 2 shed)]``."""
        scale, shift = self.modulation(embedding).view(len(x), 2, -1, *(1,) * (x.ndim - 2)).unbind(1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale)))
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

    def mix(self, conv: nn.Conv2d | nn.Conv3d, parts: Sequence[Tensor], embedding: Tensor) -> Tensor:
        """W (1 + g(σ)) x + b of a convolution of one point, where x is the parts side by side: gains scale the weights instead,
        so that neither x nor its product with them is ever in memory.

        Arguments:
            conv: W and b.
            parts: Shapes ``[batch, channel, *points]``, best with channels last in memory.
            embedding: Shape ``[batch, embedding]``.

        Returns:
            Shape ``[batch, outputs, *points]``, channels last.
        """
        weights = conv.weight.flatten(1).to(embedding.dtype) * (1 + self.gain(embedding))[:, None]
        own = [weight.mT for weight in weights.split([part.shape[1] for part in parts], dim=2)]
        rows = [part.movedim(1, -1).flatten(1, -2) for part in parts]
        assert conv.bias is not None
        mixed = torch.baddbmm(conv.bias.to(embedding.dtype), rows[0], own[0])
        for x, weight in zip(rows[1:], own[1:], strict=True):
            mixed = mixed.baddbmm_(x, weight)
        return mixed.view(len(mixed), *parts[0].shape[2:], -1).movedim(-1, 1)


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


def refine(x: Tensor, wraps: bool = False, rim: int = 0) -> Tensor:
    """Linear interpolation of cell values to half the spacing, extrapolated to the outermost points: exact for linear functions.

    Arguments:
        x: Shape ``[batch, channel, *points]``; twice as many points come out on every axis, channels last in memory.
        wraps: Whether the points close on themselves, so that there are no outermost ones.
        rim: Points to add on every side, with the values of the outermost ones.
    """
    if wraps:
        return crop(refine(F.pad(x, [1] * 2 * (x.ndim - 2), mode="circular")), 2)
    x = x.movedim(1, -1)
    for axis in range(1, x.ndim - 1):
        x = along(x, axis, _halving(x.shape[axis], rim))
    return x.movedim(-1, 1)


def along(x: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """y(.., j, ..) = Σ_i x(.., i, ..) M(i, j) along one axis, without a copy of what lies in memory in the order of its axes.

    Arguments:
        x: Shape ``[*before, i, *behind]``.
        axis: Number of the axis.
        matrix: M, with shape ``[i, j]``.

    Returns:
        Shape ``[*before, j, *behind]``, contiguous.
    """
    matrix = matrix.to(x)
    if axis == x.ndim - 1:
        return x @ matrix
    before, behind = x.shape[:axis], x.shape[axis + 1 :]
    return (matrix.T @ x.reshape(before.numel(), x.shape[axis], behind.numel())).view(*before, -1, *behind)


def crop(x: Tensor, width: int) -> Tensor:
    """Take ``width`` points off every side of ``[batch, channel, *points]``."""
    return F.pad(x, [-width] * 2 * (x.ndim - 2)) if width else x  # slices would have gradients with channels first


def _halving(cells: int, rim: int) -> Tensor:
    """Weights of the two nearest cells for every new point, with shape ``[cells, 2 cells + 2 rim]``."""
    new = torch.arange(-rim, 2 * cells + rim)
    points = (new.clamp(0, 2 * cells - 1) + 0.5).double() / 2 - 0.5
    weights = torch.zeros(cells, len(new), dtype=torch.float64)
    if cells == 1:
        return weights + 1
    left = points.floor().clamp(0, cells - 2).long()
    weights[left, new + rim] = 1 - (points - left)
    weights[left + 1, new + rim] = points - left
    return weights


def zero(module: nn.Conv2d | nn.Conv3d) -> nn.Conv2d | nn.Conv3d:
    """A convolution that gives 0 until it is trained."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module
