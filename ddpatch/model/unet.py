"""The fine level: a U-Net that runs on one patch at a time, with weights that all patches share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpatch.model.layers import CONV, CONV_TRANSPOSE, PointNorm, ResidualBlock


class Stem(nn.Module):
    """The first convolutions, on the window. With halo δ they are δ unpadded 3^d convolutions, which use up the halo exactly.

    Arguments:
        ndim: 2 or 3.
        inputs, outputs: Channels.
        halo: Width δ in points; 0 stands for one convolution padded with zeros.
    """

    def __init__(self, ndim: int, inputs: int, outputs: int, halo: int) -> None:
        super().__init__()
        widths = [inputs] + [outputs] * max(1, halo)
        self.layers = nn.ModuleList(CONV[ndim](i, o, 3, padding=0 if halo else 1) for i, o in pairwise(widths))

    def forward(self, window: Tensor) -> Tensor:
        """Map windows ``[batch, inputs, *(patch_shape + 2 δ)]`` to ``[batch, outputs, *patch_shape]``."""
        h = self.layers[0](window)
        for layer in list(self.layers)[1:]:
            h = layer(F.silu(h))
        return h


class Encoder(nn.Module):
    """Stem, then per level: residual blocks, and a 2^d patch merging to the next level.

    Arguments:
        ndim: 2 or 3.
        inputs: Channels of the window.
        channels: Channels per level, finest first.
        blocks: Residual blocks per level.
        halo: Width δ of the window's halo.
        embedding: Width of the noise embedding.
    """

    def __init__(self, ndim: int, inputs: int, channels: Sequence[int], blocks: int, halo: int, embedding: int) -> None:
        super().__init__()
        self.stem = Stem(ndim, inputs, channels[0], halo)
        self.levels = nn.ModuleList(
            nn.ModuleList(ResidualBlock(ndim, width, width, embedding) for _ in range(blocks)) for width in channels
        )
        self.downs = nn.ModuleList(CONV[ndim](fine, coarse, 2, stride=2) for fine, coarse in pairwise(channels))

    def forward(self, window: Tensor, embedding: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Encode windows ``[batch, inputs, *(patch_shape + 2 δ)]``.

        Returns:
            The latent ``[batch, channels[-1], *latent_shape]`` and the skips of all finer levels, finest first.
        """
        h, skips = self.stem(window), []
        for i, level in enumerate(self.levels):
            for block in _modules(level):
                h = block(h, embedding)
            if i < len(self.downs):
                skips.append(h)
                h = self.downs[i](h)
        return h, skips


class Decoder(nn.Module):
    """Per level, coarsest first: residual blocks on the merged features, and a 2^d unmerging to the next finer level.

    Arguments:
        ndim: 2 or 3.
        outputs: Channels of the result.
        channels: Channels per level, finest first.
        blocks: Residual blocks per level.
        embedding: Width of the noise embedding.
    """

    def __init__(self, ndim: int, outputs: int, channels: Sequence[int], blocks: int, embedding: int) -> None:
        super().__init__()
        conv = CONV[ndim]
        pairs = list(pairwise(channels))
        self.ups = nn.ModuleList(CONV_TRANSPOSE[ndim](coarse, fine, 2, stride=2) for fine, coarse in pairs)
        self.merges = nn.ModuleList(conv(2 * fine, fine, 1) for fine, _ in pairs)
        self.levels = nn.ModuleList(
            nn.ModuleList(ResidualBlock(ndim, width, width, embedding) for _ in range(blocks)) for width in channels
        )
        self.norm = PointNorm(channels[0])
        self.out = conv(channels[0], outputs, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, latent: Tensor, skips: Sequence[Tensor], embedding: Tensor, fine: Tensor) -> Tensor:
        """Decode.

        Arguments:
            latent: Shape ``[batch, channels[-1], *latent_shape]``, coupled.
            skips: Features of the finer levels, finest first.
            embedding: Shape ``[batch, embedding]``.
            fine: What the coarse level adds at the finest level, with shape ``[batch, channels[0], *patch_shape]``.

        Returns:
            Shape ``[batch, outputs, *patch_shape]``.
        """
        h = latent
        for i in reversed(range(len(self.levels))):
            if i < len(self.ups):
                h = self.merges[i](torch.cat([self.ups[i](h), skips[i]], dim=1))
            if i == 0:
                h = h + fine
            for block in _modules(self.levels[i]):
                h = block(h, embedding)
        return self.out(F.silu(self.norm(h)))


def _modules(level: nn.Module) -> list[nn.Module]:
    return list(level.children())
