"""The coarse level: a vision transformer over the tokens of all patches.

Attention is the sum of a content term and a geometric term. Head h looks at a displacement c_h with a range ℓ_h, both learned,
in units of the token spacing:

    logit(x, y) = s <q̂(x), k̂(y)> + Σ_axes κ_a (cos(2π (y_a - x_a - c_a) / L_a) - 1),   κ_a = (L_a / (2π ℓ))²

The second term is -(y - x - c)² / 2ℓ² for displacements that are small against the length L_a of the axis, and closes on itself
on periodic axes (a wall doubles L_a, so that the two ends do not meet). It depends on physical displacements only, so that a
trained network runs on other numbers of patches; and it is an inner product, so that any attention kernel evaluates it without
a table of pairs. What x attends to are tokens y, or means of the tokens of a block, at its centre: k^d a patch in place of q^d,
whence (k/q)^d of the pairs.

Every rank transforms all tokens, or its own only, with the keys and values of all gathered in every block: T²/R in place of T²
pairs of tokens on R ranks, for as many gathers as there are blocks. Attention heads with a learned centre and range contain
convolutions: Cordonnier, Loukas, Jaggi, ICLR 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ddpatch.model.convolution import CONV
from ddpatch.model.layers import Gain, PointNorm, normalise
from ddpatch.model.tokens import frame


class Audience(NamedTuple):
    """Which tokens attend to which means of tokens.

    Attributes:
        places: Coordinates of the tokens that are transformed here, in token spacings, with shape ``[token, axis]``.
        key_places: Of the means of all tokens, with shape ``[key, axis]``.
        lengths: Length of each axis before it closes, in token spacings, with shape ``[axis]``.
        pool: ``[sample, token here, feature]`` to means, ``[sample, key here, feature]``.
        gather: ``[sample, key here, feature]`` to ``[sample, key, feature]``, in the order of ``key_places``. Collective.
    """

    places: Tensor
    key_places: Tensor
    lengths: Tensor
    pool: Callable[[Tensor], Tensor]
    gather: Callable[[Tensor], Tensor]


class GeometricAttention(nn.Module):
    """Multi-head attention with a window of learned centre and range per head; the range varies with the noise level.

    Arguments:
        ndim: Axes of the grid.
        width: Width of a token.
        heads: Number of heads.
        embedding: Width of the noise embedding.
    """

    def __init__(self, ndim: int, width: int, heads: int, embedding: int) -> None:
        super().__init__()
        self.heads = heads
        self.qk = nn.Linear(width, 2 * width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)
        self.sharpness = nn.Parameter(torch.zeros(heads))
        ranges = torch.logspace(0, 3, heads, base=2.0)
        self.log_range = nn.Parameter(ranges.log())
        self.centre = nn.Parameter(torch.randn(heads, ndim) * ranges[:, None] / 2)
        self.range_of_noise = nn.Linear(embedding, heads)
        nn.init.zeros_(self.range_of_noise.weight)
        nn.init.zeros_(self.range_of_noise.bias)

    def forward(self, x: Tensor, normed: Tensor, embedding: Tensor, audience: Audience) -> Tensor:
        """Attend. Collective where the audience's gather is.

        Arguments:
            x: Tokens, with shape ``[sample, token, width]``: the values are linear in them.
            normed: The normalised tokens, of the same shape: what queries and keys are made of.
            embedding: Shape ``[sample, embedding]``.
            audience: Of the tokens.
        """
        to_q, to_k = self.qk.weight.chunk(2)
        q, k, v = F.linear(normed, to_q), F.linear(audience.pool(normed), to_k), self.v(audience.pool(x))
        everywhere = audience.gather(torch.cat([k, v], dim=-1))
        q = rearrange(q, "b n (h c) -> b h n c", h=self.heads)
        k, v = rearrange(everywhere, "b n (two h c) -> two b h n c", two=2, h=self.heads)
        scale = self.sharpness.exp()[:, None, None] * math.sqrt(q.shape[-1])
        where_q, where_k = self._windows(embedding, audience)
        q = torch.cat([F.normalize(q, dim=-1) * scale, where_q], dim=-1)
        k = torch.cat([F.normalize(k, dim=-1), where_k.expand(*k.shape[:2], -1, -1)], dim=-1)
        width = -(-q.shape[-1] // 8) * 8  # of a head, with zeros: kernels like multiples of 8, and the same for all three
        q, k, padded = (F.pad(part, (0, width - part.shape[-1])) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, padded, scale=1.0)[..., : v.shape[-1]]
        return self.out(rearrange(y, "b h n c -> b n (h c)"))

    def _windows(self, embedding: Tensor, audience: Audience) -> tuple[Tensor, Tensor]:
        """The geometric parts of queries and keys, with shapes ``[sample, head, token, 2 axis]`` and ``[1, head, ...]``."""
        reach = (self.log_range + self.range_of_noise(embedding)).exp()
        stiffness = (audience.lengths / (2 * math.pi * reach[..., None])).square()
        turn = 2 * math.pi / audience.lengths
        angles_q = (audience.places[None] + self.centre[:, None]) * turn
        angles_k = audience.key_places[None] * turn
        where_q = torch.cat([angles_q.cos(), angles_q.sin()], dim=-1) * torch.cat([stiffness, stiffness], dim=-1)[:, :, None]
        return where_q, torch.cat([angles_k.cos(), angles_k.sin()], dim=-1)[None]


class CoarseBlock(nn.Module):
    """Pre-norm transformer block, both norms modulated by the noise embedding."""

    def __init__(self, ndim: int, width: int, heads: int, embedding: int) -> None:
        super().__init__()
        self.attention = GeometricAttention(ndim, width, heads, embedding)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.modulation = nn.Linear(embedding, 4 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, embedding: Tensor, audience: Audience) -> Tensor:
        """Map tokens ``[sample, token, width]`` to the same shape."""
        scale1, shift1, scale2, shift2 = self.modulation(embedding).chunk(4, dim=-1)
        normed = normalise(x, self.norm1.weight, self.norm1.bias, 1 + scale1, shift1)
        x = x + self.attention(x, normed, embedding, audience)
        return x + self.perceptron(normalise(x, self.norm2.weight, self.norm2.bias, 1 + scale2, shift2))


class CoarseTransformer(nn.Module):
    """The vision transformer over all tokens.

    Arguments:
        ndim: Axes of the grid.
        inputs: Features of a token as it arrives.
        width: Width within the transformer and of the result.
        layers, heads: Number of blocks, and of heads per block.
        embedding: Width of the noise embedding.
    """

    def __init__(self, ndim: int, inputs: int, width: int, layers: int, heads: int, embedding: int) -> None:
        super().__init__()
        self.enter = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(CoarseBlock(ndim, width, heads, embedding) for _ in range(layers))
        self.gain = Gain(width, embedding)

    def forward(self, tokens: Tensor, embedding: Tensor, audience: Audience) -> Tensor:
        """Couple tokens with all tokens. Collective where the audience's gather is.

        Arguments:
            tokens: Those that are transformed here, with shape ``[sample, token, inputs]``.
            embedding: Shape ``[sample, embedding]``.
            audience: Where they are, and where all others.

        Returns:
            Shape ``[sample, token, width]``.
        """
        x = self.enter(tokens)
        for block in self.blocks:
            x = block(x, embedding, audience)
        return self.gain(x.transpose(1, 2), embedding).transpose(1, 2)


class ConvolutionalCommunicator(nn.Module):
    """The coarse level of DDU-Net: three 5^d convolutions over the tokens in place, which reach 6 tokens far.

    Verburg, Heinlein, Cyr, IEEE Access 13, 2025; with the norm of this package instead of batch norm, whose statistics would be
    another communication.

    Arguments:
        ndim: 2 or 3.
        inputs, width: Features of a token as it arrives, and of the result.
        layers: Number of convolutions.
    """

    def __init__(self, ndim: int, inputs: int, width: int, layers: int = 3) -> None:
        super().__init__()
        widths = [inputs] + [width] * layers
        self.layers = nn.ModuleList(CONV[ndim](a, b, 5) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(PointNorm(width) for _ in range(layers))

    def forward(self, canvas: Tensor, embedding: Tensor, periodic: Sequence[bool]) -> Tensor:
        """Map tokens in place ``[sample, *token_grid, inputs]`` to ``[sample, *token_grid, width]``."""
        h = canvas.movedim(-1, 1)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            h = F.relu(norm(layer(frame(h, periodic, 2))))
        return h.movedim(1, -1)


def token_places(token_grid: Sequence[int], device: torch.device) -> Tensor:
    """Coordinates of the token centres in token spacings, with shape ``[*token_grid, axis]``."""
    axes = [torch.arange(n, dtype=torch.float64, device=device) + 0.5 for n in token_grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def closing_lengths(token_grid: Sequence[int], periodic: Sequence[bool], like: Tensor) -> Tensor:
    """Length of each axis before it closes, in token spacings, with shape ``[axis]``: a wall doubles it."""
    return torch.cat([like.new_full((1,), n * (1.0 if wraps else 2.0)) for n, wraps in zip(token_grid, periodic, strict=True)])
