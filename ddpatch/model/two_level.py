"""The two-level network: shared U-Net on every patch (fine level), vision transformer over all tokens (coarse level)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpatch.config import ModelConfig
from ddpatch.decomposition import Decomposition
from ddpatch.model.coarse import CoarseTransformer, ConvolutionalCommunicator
from ddpatch.model.layers import CHANNELS_LAST, NoiseEmbedding, ResidualBlock
from ddpatch.model.positions import coordinate_features, num_coordinate_features
from ddpatch.model.tokens import Prolongation, Restriction, check_tokens, mean_scale, own_boxes, splines, to_canvas, weighting
from ddpatch.model.unet import Decoder, Encoder
from ddpatch.model.wiener import LinearPart


class Coupling(Protocol):
    """What the network is given to reach other patches. See :class:`ddpatch.parallel.collectives.Exchange`."""

    @property
    def decomposition(self) -> Decomposition:
        """The grid and its patches."""

    @property
    def patches(self) -> Sequence[int]:
        """Global numbers of the own patches."""

    def gather(self, tokens: Tensor) -> Tensor:
        """``[sample, local patch, ...]`` to ``[sample, patch, ...]``. Collective."""

    def halo(self, patches: Tensor) -> Tensor:
        """``[sample, local patch, channel, *patch_shape]`` to windows of ``patch_shape + 2 δ``. Collective."""


class OwnPatch:
    """The coupling of a patch that is a field of its own: nobody to gather from, and nothing beyond the patch.

    Arguments:
        patch_shape: Points of the patch.
        halo: Width δ of the windows.
    """

    def __init__(self, patch_shape: Sequence[int], halo: int) -> None:
        shape = tuple(patch_shape)
        self.decomposition, self.patches = Decomposition(shape, shape, 1, (False,) * len(shape)), [0]
        self._pad = [halo] * 2 * len(shape)

    def gather(self, tokens: Tensor) -> Tensor:
        """The tokens themselves."""
        return tokens

    def halo(self, patches: Tensor) -> Tensor:
        """Patches framed with zeros."""
        return F.pad(patches, self._pad)


class TwoLevelModel(nn.Module):
    """Two-level domain decomposition as a network: one halo exchange and one gather per evaluation, whatever its depth.

    Arguments:
        channels: Channels of the field.
        ndim: 2 or 3.
        config: Widths, halo and tokens.
        periodic: Per axis; walls add a channel that marks the inside.
        linear: What is added to the network's output, which is then scaled. Default: nothing.
    """

    def __init__(
        self, channels: int, ndim: int, config: ModelConfig, periodic: Sequence[bool], linear: LinearPart | None = None
    ) -> None:
        super().__init__()
        self.config, self.periodic, self.channels, self.linear = config, tuple(periodic), channels, linear
        self.overlap = tuple(config.reach if wraps else 0 for wraps in self.periodic)  # there is nothing behind a wall
        paths, wraps = config.paths, config.paths.whole and all(periodic)
        widths, embedding = config.channels, 4 * config.channels[0]
        extra = num_coordinate_features(self.periodic, config.positions)
        self.embed = NoiseEmbedding(embedding)
        self.encoder = Encoder(ndim, channels, extra, widths, config.blocks, config.reach, embedding, wraps)
        self.decoder = Decoder(ndim, channels, widths, config.blocks, embedding, wraps)
        self.bottleneck = ResidualBlock(ndim, widths[-1], widths[-1], embedding, wraps)
        if paths.coarse:
            self.restriction = Restriction(ndim, widths[-1], config.token_channels, config.tokens, paths.means)
            inputs, width = config.token_channels + paths.means * channels + extra, config.coarse_width
            self.coarse = (
                CoarseTransformer(ndim, inputs, width, config.coarse_layers, config.coarse_heads, embedding)
                if paths.coarse == "transformer"
                else ConvolutionalCommunicator(ndim, inputs, width)
            )
            self.prolongation = Prolongation(ndim, width, widths[-1], paths.fine * widths[0])
        self.to(memory_format=CHANNELS_LAST[ndim])  # type: ignore[call-overload]

    def forward(self, x: Tensor, noise: Tensor, coupling: Coupling) -> Tensor:
        """Evaluate the network on the own patches. Collective.

        Arguments:
            x: Scaled noisy patches c_in x_t, with shape ``[sample, local patch, channel, *patch_shape]``.
            noise: c_noise = ln(σ)/4, one value per sample shared by all its patches, with shape ``[sample]``.
            coupling: How to reach other patches.

        Returns:
            Shape of ``x``.
        """
        sigma, embedding = (4 * noise).exp(), self.embed(noise)
        repeated = embedding.repeat_interleave(x.shape[1], dim=0)
        place = coordinate_features(coupling.decomposition, coupling.patches, self.config.reach, self.config.positions)
        windows = coupling.halo(x)
        latent, skips = self.encoder(windows, place.to(x), sigma, repeated)
        canvas, into_latent, into_fine = None, torch.zeros_like(latent), latent.new_zeros(())
        if self.config.paths.coarse:
            canvas = self._gather(latent, windows, sigma, coupling)
            into_latent, into_fine = self._couple(canvas, latent, embedding, coupling)
        latent = self.bottleneck(latent + into_latent, repeated)
        out = self.decoder(latent, skips, repeated, into_fine).unflatten(0, x.shape[:2])
        return out if self.linear is None else self._add_linear(self.linear, out, windows, canvas, sigma, coupling)

    def _gather(self, latent: Tensor, windows: Tensor, sigma: Tensor, coupling: Coupling) -> Tensor:
        """The tokens of all patches in place, with shape ``[sample, *token_grid, feature]``."""
        decomposition, q = coupling.decomposition, self.config.tokens
        check_tokens(decomposition.patch_shape, q, len(self.config.channels))
        own = self.restriction(latent, windows, sigma, self.config.reach, self.overlap)
        return to_canvas(coupling.gather(own), decomposition.patch_grid, q)

    def _add_linear(
        self, linear: LinearPart, out: Tensor, windows: Tensor, canvas: Tensor | None, sigma: Tensor, coupling: Coupling
    ) -> Tensor:
        """L u + g out, the coarse part of L from the means that the tokens carry."""
        total = linear.fine(windows, sigma, self.config.reach) + linear.scale(sigma).view(-1, *(1,) * (out.ndim - 1)) * out
        if canvas is None or linear.cell is None:
            return total
        kernels = [weighting(m, overlap) for m, overlap in zip(linear.cell, self.overlap, strict=True)]
        scale = mean_scale(sigma, kernels).view(-1, *(1,) * (canvas.ndim - 1))
        found = linear.coarse(canvas[..., -self.channels :] / scale, sigma)
        return total + splines(found, coupling.decomposition, coupling.patches)

    def _couple(self, canvas: Tensor, latent: Tensor, embedding: Tensor, coupling: Coupling) -> tuple[Tensor, Tensor]:
        """Transform and prolong: contributions to the latent and to the finest decoder stage."""
        decomposition, q, ndim = coupling.decomposition, self.config.tokens, len(self.periodic)
        grid = canvas.shape[1:-1]
        tokens = torch.cat([canvas, self._token_features(decomposition).to(canvas).expand(len(canvas), *grid, -1)], dim=-1)
        canvas = self.coarse(tokens, embedding, self.periodic)
        own = own_boxes(canvas.movedim(-1, 1), decomposition, coupling.patches, [q] * ndim)
        into_latent = self.prolongation.latent(own.flatten(0, 1).movedim(1, -1), latent.shape[2:])
        into_fine = self.prolongation.fine(canvas, decomposition, coupling.patches)
        return into_latent, into_fine.flatten(0, 1) if into_fine.ndim else into_fine

    def _token_features(self, decomposition: Decomposition) -> Tensor:
        """Coordinates of all tokens, with shape ``[*token_grid, feature]``: those of a grid with a point per token."""
        token_grid = tuple(n * self.config.tokens for n in decomposition.patch_grid)
        tokens = Decomposition(token_grid, token_grid, 1, decomposition.periodic)
        return coordinate_features(tokens, [0], 0, self.config.positions)[0].movedim(0, -1)


def count_parameters(module: nn.Module) -> int:
    """Number of trainable numbers."""
    return sum(math.prod(p.shape) for p in module.parameters() if p.requires_grad)
