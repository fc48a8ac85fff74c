"""A monolithic U-Net cut into slabs: a halo before every convolution, and group norms whose statistics are summed over all ranks.

The scheme of domain-parallel convolutions (ShardTensor of PhysicsNeMo, distconv): every rank computes its slab of every feature
map, so that the result is that of one U-Net on the whole periodic volume, and every layer communicates. For comparison only.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpatch.model.convolution import CHANNELS_LAST
from ddpatch.model.layers import NoiseEmbedding
from ddpatch.parallel.comm import Communicator

GROUPS = 8


class _Planes(torch.autograd.Function):
    """Forward: a plane of each neighbour on either side of ``[batch, channel, x, y, z]``. Backward: they are added back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator) -> Tensor:
        ctx.comm = comm
        low, high = _swap(x[:, :, :1], x[:, :, -1:], comm)
        return torch.cat([low, x, high], dim=2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0]
        low, high = _swap(grad[:, :, :1], grad[:, :, -1:], ctx.comm)
        inner = grad[:, :, 1:-1].clone()
        inner[:, :, :1] += low  # what the lower neighbour's window had of this slab
        inner[:, :, -1:] += high
        return inner, None


def _swap(first: Tensor, last: Tensor, comm: Communicator) -> tuple[Tensor, Tensor]:
    """The lower neighbour's last plane and the upper one's first, for the own first and last: one message per neighbour."""
    lower, upper = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    if lower == upper:  # one rank, or two: both planes go to the same one
        both = comm.exchange({lower: torch.stack([first, last])}, {lower: torch.stack([first, last])}, "slab")[lower]
        return both[1], both[0]
    found = comm.exchange({lower: first, upper: last}, {lower: last, upper: first}, "slab")
    return found[lower], found[upper]


class _Sum(torch.autograd.Function):
    """Forward and backward: the sum over all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator) -> Tensor:
        ctx.comm = comm
        return comm.allreduce_(x.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.comm.allreduce_(grads[0].clone()), None


class SlabConvolution(nn.Conv3d):
    """A periodic 3³ convolution of a slab."""

    def __init__(self, inputs: int, outputs: int, comm: Communicator) -> None:
        super().__init__(inputs, outputs, 3)
        self.comm = comm

    def forward(self, x: Tensor) -> Tensor:
        """Collective."""
        return super().forward(F.pad(_Planes.apply(x, self.comm), (1, 1, 1, 1, 0, 0), mode="circular"))


class SlabNorm(nn.Module):
    """A group norm over all slabs."""

    def __init__(self, channels: int, comm: Communicator) -> None:
        super().__init__()
        self.gain, self.bias, self.comm = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels)), comm

    def forward(self, x: Tensor) -> Tensor:
        """Collective."""
        groups = x.unflatten(1, (GROUPS, -1)).flatten(2)
        moments = _Sum.apply(torch.stack([groups.mean(2), groups.square().mean(2)]), self.comm) / self.comm.size
        scale = (moments[1] - moments[0].square() + 1e-5).rsqrt()
        wide = [m.repeat_interleave(x.shape[1] // GROUPS, dim=1)[..., None, None, None] for m in (moments[0], scale)]
        gain = self.gain.view(-1, 1, 1, 1)
        return (x - wide[0]) * (wide[1] * gain) + self.bias.view(-1, 1, 1, 1)


class SlabBlock(nn.Module):
    """A residual block, with the second norm modulated by the noise."""

    def __init__(self, inputs: int, outputs: int, embedding: int, comm: Communicator) -> None:
        super().__init__()
        self.norm1, self.norm2 = SlabNorm(inputs, comm), SlabNorm(outputs, comm)
        self.conv1, self.conv2 = SlabConvolution(inputs, outputs, comm), SlabConvolution(outputs, outputs, comm)
        self.modulation = nn.Linear(embedding, 2 * outputs)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv3d(inputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Collective."""
        scale, shift = self.modulation(embedding)[..., None, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))


class SlabUNet(nn.Module):
    """The U-Net: a block per level and side, and one between.

    Arguments:
        channels: Of the field.
        widths: Per level, finest first.
        comm: The ranks, with a slab each of the first axis.
    """

    def __init__(self, channels: int, widths: Sequence[int], comm: Communicator) -> None:
        super().__init__()
        embedding, pairs = 4 * widths[0], list(pairwise(widths))
        self.embed, self.enter = NoiseEmbedding(embedding), SlabConvolution(channels, widths[0], comm)
        self.encoders = nn.ModuleList(SlabBlock(n, n, embedding, comm) for n in widths)
        self.downs = nn.ModuleList(nn.Conv3d(fine, coarse, 2, stride=2) for fine, coarse in pairs)
        self.middle = SlabBlock(widths[-1], widths[-1], embedding, comm)
        self.ups = nn.ModuleList(nn.Conv3d(coarse, fine, 1) for fine, coarse in pairs)
        self.merges = nn.ModuleList(nn.Conv3d(2 * fine, fine, 1) for fine, _ in pairs)
        self.decoders = nn.ModuleList(SlabBlock(n, n, embedding, comm) for n in widths)
        self.norm, self.out = SlabNorm(widths[0], comm), SlabConvolution(widths[0], channels, comm)
        self.to(memory_format=CHANNELS_LAST[3])  # type: ignore[call-overload]

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """Map ``[sample, channel, *slab]`` and ``[sample]`` to the shape of ``x``. Collective."""
        embedding, skips = self.embed(noise), []
        h = self.enter(x)
        for i, block in enumerate(self.encoders):
            h = block(h, embedding)
            if i < len(self.downs):
                skips.append(h)
                h = self.downs[i](h)
        h = self.middle(h, embedding)
        for i in reversed(range(len(self.decoders))):
            if i < len(self.ups):
                finer = F.interpolate(self.ups[i](h), scale_factor=2.0)
                h = self.merges[i](torch.cat([finer, skips[i]], dim=1))
            h = self.decoders[i](h, embedding)
        return self.out(F.silu(self.norm(h)))
