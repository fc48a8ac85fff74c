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
from ddpatch.model.interpolation import Interpolation, doubled, map_rows, merge
from ddpatch.model.layers import Gain, ResidualBlock, crop, zero
from ddpatch.model.stencil import StencilConvolution


class Stem(nn.Module):
    """The first convolutions, on the window: unpadded ones of 3^d points, which use up the halo δ but for a rim ρ < δ.

    The first is linear, on whitened stencils; the others are residual: h → crop(h) + conv(silu(h)).

    Arguments:
        ndim: 2 or 3.
        inputs: Channels of the field.
        features: Channels of coordinates.
        outputs: Channels of the result.
        depth: Convolutions, δ - ρ; 0 stands for one that is padded with zeros.
        spare: Points of the halo that are left out, ρ where nothing is to be left of it.
    """

    def __init__(self, ndim: int, inputs: int, features: int, outputs: int, depth: int, spare: int = 0) -> None:
        super().__init__()
        self.margin = -spare if depth else 1
        self.stencil = StencilConvolution(ndim, inputs, outputs)
        self.place = CONV[ndim](features, outputs, 1, bias=False) if features else None
        self.layers = nn.ModuleList(CONV[ndim](outputs, outputs, 3) for _ in range(depth - 1))

    def forward(self, windows: Tensor, coordinates: Tensor, sigma: Tensor, dtype: torch.dtype) -> Tensor:
        """Map windows ``[sample, patch, inputs, *(patch_shape + 2 δ)]`` to ``[sample * patch, outputs, *(patch_shape + 2 ρ)]``.

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
        rim: Width ρ of what is left of it at the finest level, unless the patch closes on itself.
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
        rim: int,
        embedding: int,
        wraps: bool = False,
    ) -> None:
        super().__init__()
        self.rim = 0 if wraps else rim
        self.stem = Stem(ndim, inputs, features, channels[0], halo - rim, rim - self.rim)
        self.levels = nn.ModuleList(
            nn.ModuleList(ResidualBlock(ndim, width, width, embedding, wraps) for _ in range(blocks)) for width in channels
        )
        self.downs = nn.ModuleList(CONV[ndim](fine, coarse, 2, stride=2) for fine, coarse in pairwise(channels))

    def forward(self, windows: Tensor, coordinates: Tensor, sigma: Tensor, embedding: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Encode windows; a batch is all patches of all samples, sample by sample.

        Arguments:
            windows: The scaled field c_in x, with shape ``[sample, patch, inputs, *(patch_shape + 2 δ)]``.
            coordinates: Shape ``[patch, features, *(patch_shape + 2 δ)]``.
            sigma: Shape ``[sample]``.
            embedding: Shape ``[sample, embedding]``; its type is that of all features.

        Returns:
            The latent ``[batch, channels[-1], *latent_shape]`` and the skips of all finer levels; the finest, which is first, has
            the rim.
        """
        h, skips = self.stem(windows, coordinates, sigma, embedding.dtype), []
        for i, level in enumerate(self.levels):
            for block in _modules(level):
                h = block(h, embedding)
            if i < len(self.downs):
                skips.append(h)
                h = self.downs[i](h if i else crop(h, self.rim))
        return h, skips


class Decoder(nn.Module):
    """Per level, coarsest first: residual blocks on the merged features, and linear interpolation to the next finer level.

    The finest level has a rim around the patch, as wide as that of the skip: its last convolutions then see on either side of a
    border what the neighbour sees, in place of zeros. The very last takes a point of the rim off.

    Arguments:
        ndim: 2 or 3.
        outputs: Channels of the result.
        channels: Channels per level, finest first.
        blocks: Residual blocks per level.
        rim: Width ρ of that of the finest skip, unless the patch closes on itself.
        embedding: Width of the noise embedding.
        wraps: Whether the patch is a grid that closes on itself.
    """

    def __init__(
        self, ndim: int, outputs: int, channels: Sequence[int], blocks: int, rim: int, embedding: int, wraps: bool = False
    ) -> None:
        super().__init__()
        conv, self.rim, self.wraps = CONV[ndim], 0 if wraps else rim, wraps
        pairs = list(pairwise(channels))
        self.ups = nn.ModuleList(conv(coarse, fine, 1) for fine, coarse in pairs)
        self.gains = nn.ModuleList(Gain(2 * fine, embedding) for fine, _ in pairs)
        self.merges = nn.ModuleList(conv(2 * fine, fine, 1) for fine, _ in pairs)
        self.shed = min(self.rim, 1)
        self.levels = nn.ModuleList(
            nn.ModuleList(
                ResidualBlock(ndim, width, width, embedding, wraps, self.shed * ((i, j) == (0, blocks - 1)))
                for j in range(blocks)
            )
            for i, width in enumerate(channels)
        )
        self.gain = Gain(channels[0], embedding)
        self.out = zero(conv(channels[0], outputs, 1))

    def forward(self, latent: Tensor, skips: Sequence[Tensor], embedding: Tensor, fine: Sequence[Interpolation] = ()) -> Tensor:
        """Decode.

        Arguments:
            latent: Shape ``[batch, channels[-1], *latent_shape]``, coupled.
            skips: Features of the finer levels, finest first.
            embedding: Shape ``[sample, embedding]``.
            fine: What else is added at the finest level, ``channels[0]`` channels at ``patch_shape + 2 ρ`` points.

        Returns:
            Shape ``[batch, outputs, *patch_shape]``.
        """
        h = latent
        for i in reversed(range(len(self.levels))):
            if i < len(self.ups):
                h = self._merge(i, h, skips[i], embedding, () if i else fine)
            elif i == 0:
                h = sum((part.points().to(h) for part in fine), h)
            for block in _modules(self.levels[i]):
                h = block(h, embedding)
        gain: Any = self.gain
        return map_rows(crop(h, self.rim - self.shed), gain.scaled(self.out, embedding), self.out.bias)

    def _merge(self, level: int, coarse: Tensor, skip: Tensor, embedding: Tensor, others: Sequence[Interpolation]) -> Tensor:
        """W (1 + g(σ)) [coarse features, skip] + b; the former are mapped before they are interpolated, which is the same."""
        modules: tuple[Any, Any, Any] = self.ups[level], self.gains[level], self.merges[level]
        up, gain, conv = modules
        to_coarse, to_skip = gain.scaled(conv, embedding).chunk(2, dim=2)
        coarser = doubled(map_rows(up(coarse), to_coarse), self.wraps, 0 if level else self.rim)
        return merge(skip, to_skip, conv.bias, [coarser, *others])


def _modules(level: nn.Module) -> list[nn.Module]:
    return list(level.children())
