"""The fine level: a U-Net that runs on one patch at a time, with weights that all patches share.

Blocks are residual, merges are linear, and there is no norm before the output, so that a path leads from the input through every
level to the output that is linear in the field, with gains that depend on σ: a multilevel Wiener filter, which the blocks
correct. Where the signal is strong in few modes, a network without that path spends its training on reproducing amplitudes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpatch.model.convolution import CONV
from ddpatch.model.layers import Gain, ResidualBlock, crop, refine, zero
from ddpatch.model.stencil import StencilConvolution


class Stem(nn.Module):
    """The first convolutions, on the window. With halo δ they are δ unpadded 3^d convolutions, which use up the halo exactly.

    The first is linear, on whitened stencils; the others are residual: h → crop(h) + conv(silu(h)).

    Arguments:
        ndim: 2 or 3.
        inputs: Channels of the field.
        features: Channels of coordinates.
        outputs: Channels of the result.
        halo: Width δ in points; 0 stands for one convolution padded with zeros.
    """

    def __init__(self, ndim: int, inputs: int, features: int, outputs: int, halo: int) -> None:
        super().__init__()
        self.margin = 0 if halo else 1
        self.stencil = StencilConvolution(ndim, inputs, outputs)
        self.place = CONV[ndim](features, outputs, 1, bias=False) if features else None
        self.layers = nn.ModuleList(CONV[ndim](outputs, outputs, 3) for _ in range(halo - 1))

    def forward(self, windows: Tensor, coordinates: Tensor, sigma: Tensor, dtype: torch.dtype) -> Tensor:
        """Map windows ``[sample, patch, inputs, *(patch_shape + 2 δ)]`` to ``[sample * patch, outputs, *patch_shape]``.

        What whitening makes of a smooth field is small differences, so that the first convolution has the type of the field.

        Arguments:
            windows: The scaled field c_in x.
            coordinates: Shape ``[patch, features, *(patch_shape + 2 δ)]``.
            sigma: Shape ``[sample]``.
            dtype: Of the result, and of all other layers.
        """
        pad, samples = [self.margin] * 2 * (windows.ndim - 3), len(windows)
        h = self.stencil(F.pad(windows, pad), sigma)
        if self.place is not None:
            h = h + crop(self.place(F.pad(coordinates, pad)), 1).repeat(samples, *(1,) * (h.ndim - 1))
        h = h.to(dtype)  # channels last in memory, which whatever is added to it takes over
        for layer in self.layers:
            h = crop(h, 1) + layer(F.silu(h))
        return h


class Encoder(nn.Module):
    """Stem, then per level: residual blocks, and a 2^d patch merging to the next level.

    Arguments:
        ndim: 2 or 3.
        inputs: Channels of the field.
        features: Channels of coordinates.
        channels: Channels per level, finest first.
        blocks: Residual blocks per level.
        halo: Width δ of the window's halo.
        embedding: Width of the noise embedding.
        wraps: Whether the patch is a grid that closes on itself.
    """

    def __init__(
        self,
        ndim: int,
        inputs: int,
        features: int,
        channels: Sequence[int],
        blocks: int,
        halo: int,
        embedding: int,
        wraps: bool = False,
    ) -> None:
        super().__init__()
        self.stem = Stem(ndim, inputs, features, channels[0], halo)
        self.levels = nn.ModuleList(
            nn.ModuleList(ResidualBlock(ndim, width, width, embedding, wraps) for _ in range(blocks)) for width in channels
        )
        self.downs = nn.ModuleList(CONV[ndim](fine, coarse, 2, stride=2) for fine, coarse in pairwise(channels))

    def forward(self, windows: Tensor, coordinates: Tensor, sigma: Tensor, embedding: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Encode windows; a batch is all patches of all samples.

        Arguments:
            windows: The scaled field c_in x, with shape ``[sample, patch, inputs, *(patch_shape + 2 δ)]``.
            coordinates: Shape ``[patch, features, *(patch_shape + 2 δ)]``.
            sigma: Shape ``[sample]``.
            embedding: Shape ``[batch, embedding]``; its type is that of all features.

        Returns:
            The latent ``[batch, channels[-1], *latent_shape]`` and the skips of all finer levels, finest first.
        """
        h, skips = self.stem(windows, coordinates, sigma, embedding.dtype), []
        for i, level in enumerate(self.levels):
            for block in _modules(level):
                h = block(h, embedding)
            if i < len(self.downs):
                skips.append(h)
                h = self.downs[i](h)
        return h, skips


class Decoder(nn.Module):
    """Per level, coarsest first: residual blocks on the merged features, and linear interpolation to the next finer level.

    Arguments:
        ndim: 2 or 3.
        outputs: Channels of the result.
        channels: Channels per level, finest first.
        blocks: Residual blocks per level.
        embedding: Width of the noise embedding.
        wraps: Whether the patch is a grid that closes on itself.
    """

    def __init__(
        self, ndim: int, outputs: int, channels: Sequence[int], blocks: int, embedding: int, wraps: bool = False
    ) -> None:
        super().__init__()
        conv, self.wraps = CONV[ndim], wraps
        pairs = list(pairwise(channels))
        self.ups = nn.ModuleList(conv(coarse, fine, 1) for fine, coarse in pairs)
        self.gains = nn.ModuleList(Gain(2 * fine, embedding) for fine, _ in pairs)
        self.merges = nn.ModuleList(conv(2 * fine, fine, 1) for fine, _ in pairs)
        self.levels = nn.ModuleList(
            nn.ModuleList(ResidualBlock(ndim, width, width, embedding, wraps) for _ in range(blocks)) for width in channels
        )
        self.gain = Gain(channels[0], embedding)
        self.out = zero(conv(channels[0], outputs, 1))

    def forward(self, latent: Tensor, skips: Sequence[Tensor], embedding: Tensor, fine: Tensor | None = None) -> Tensor:
        """Decode.

        Arguments:
            latent: Shape ``[batch, channels[-1], *latent_shape]``, coupled.
            skips: Features of the finer levels, finest first.
            embedding: Shape ``[batch, embedding]``.
            fine: What the coarse level adds at the finest level, with shape ``[batch, channels[0], *patch_shape]``, if
                anything.

        Returns:
            Shape ``[batch, outputs, *patch_shape]``.
        """
        h = latent
        for i in reversed(range(len(self.levels))):
            if i < len(self.ups):
                gain: Any = self.gains[i]
                h = gain.mix(self.merges[i], [refine(self.ups[i](h), self.wraps), skips[i]], embedding)
            if i == 0 and fine is not None:
                h = h + fine
            for block in _modules(self.levels[i]):
                h = block(h, embedding)
        return self.out(self.gain(h, embedding))


def _modules(level: nn.Module) -> list[nn.Module]:
    return list(level.children())
