"""The two-level network: shared U-Net on every patch (fine level), vision transformer over all tokens (coarse level)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddpatch.config import ExecutionConfig, ModelConfig
from ddpatch.decomposition import Decomposition
from ddpatch.model.coarse import Audience, CoarseTransformer, ConvolutionalCommunicator, closing_lengths, token_places
from ddpatch.model.convolution import CHANNELS_LAST
from ddpatch.model.coupling import Coupling, Lag
from ddpatch.model.groups import Objective, group_by_group, sum_of_groups
from ddpatch.model.layers import NoiseEmbedding, ResidualBlock
from ddpatch.model.positions import coordinate_features, num_coordinate_features
from ddpatch.model.tokens import (
    Prolongation,
    Restriction,
    check_tokens,
    from_canvas,
    mean_blocks,
    mean_scale,
    own_boxes,
    splines,
    to_canvas,
    weighting,
)
from ddpatch.model.unet import Decoder, Encoder
from ddpatch.model.waves import DEGREE
from ddpatch.model.wiener import LinearPart

RIM = 1  # points of the halo that the finest level keeps
SHARDED_FROM = 1024  # tokens


class Group(NamedTuple):
    """Some of the own patches of all samples, which go through the fine level together.

    Attributes:
        grid: The grid and its patches.
        patches: Global numbers of those of the group.
        windows: Scaled noisy windows, with shape ``[sample, patch, channel, *(patch_shape + 2 δ)]``.
        sigma: Shape ``[sample]``.
        embedding: Of the noise levels, with shape ``[sample, embedding]``; its type is that of all features.
        tokens, fine, linear: What the coarse level tells all patches, where it does (:class:`Message`).
    """

    grid: Decomposition
    patches: Sequence[int]
    windows: Tensor
    sigma: Tensor
    embedding: Tensor
    tokens: Tensor | None = None
    fine: Tensor | None = None
    linear: Tensor | None = None


class Features(NamedTuple):
    """What the encoder makes of a group: the latent, and the skips of all finer levels (:class:`Encoder`)."""

    latent: Tensor
    skips: list[Tensor]


class Message(NamedTuple):
    """What the coarse level tells all patches.

    Attributes:
        sigma: Noise levels at which it was made, with shape ``[sample]``.
        tokens: Coupled tokens in place, with shape ``[sample, *token_grid, width]``.
        fine: Coefficients of splines for the finest decoder stage, with shape ``[sample, *token_grid, channels[0]]``, if any.
        linear: Coefficients of the coarse part of L u, with shape ``[sample, *token_grid, channel]``, if any.
    """

    sigma: Tensor
    tokens: Tensor
    fine: Tensor | None
    linear: Tensor | None


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
        rim = min(RIM, max(config.reach - 1, 0)) if len(widths) > 1 else 0
        self.encoder = Encoder(ndim, channels, extra, widths, config.blocks, config.reach, rim, embedding, wraps)
        self.decoder = Decoder(ndim, channels, widths, config.blocks, rim, embedding, wraps)
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

    @property
    def device(self) -> torch.device:
        """Where groups are computed."""
        return next(self.parameters()).device

    def forward(
        self,
        x: Tensor,
        noise: Tensor,
        coupling: Coupling,
        execution: ExecutionConfig | None = None,
        lag: Lag[Message] | None = None,
        objective: Objective | None = None,
    ) -> Tensor:
        """Evaluate the network on the own patches, which may be in host memory where no gradients are wanted. Collective.

        While halos and tokens are on their way, what needs neither is computed: of several groups, those whose neighbours are all
        on this rank are encoded first.

        Arguments:
            x: Scaled noisy patches c_in x_t, with shape ``[sample, local patch, channel, *patch_shape]``.
            noise: c_noise = ln(σ)/4, one value per sample shared by all its patches, with shape ``[sample]``.
            coupling: How to reach other patches.
            execution: How many patches of every sample have their features in memory together, and of what type these are. With
                fewer than all the encoder runs twice, for the tokens and for the result; gradients are the same
                (:mod:`ddpatch.model.groups`). Default: all, of the type of ``x``.
            lag: Lets the coarse level speak of the evaluation before, in evaluations without gradients.
            objective: What is wanted of the result, which is then never there for more patches than go together.

        Returns:
            Shape and device of ``x``, or the objective.
        """
        if self.config.paths.coarse:
            check_tokens(coupling.decomposition.patch_shape, self.config.tokens, len(self.config.channels))
        arrival, noise = coupling.start_halo(x), noise.to(self.device)
        sigma, embedding = (4 * noise).exp(), self.embed(noise)
        groups = self._groups(arrival.windows, sigma, embedding, coupling, execution)
        if len(groups) == 1 or not self.config.paths.coarse:
            arrival.wait()
        if len(groups) == 1:
            groups = [groups[0]._replace(windows=groups[0].windows.to(self.device))]
        kept = self._encode(groups[0]) if len(groups) == 1 else None

        def restrict(*members: Any) -> Tensor:
            group = Group(*members)
            return self._restrict(group, kept or self._encode(group))

        def decode(*members: Any) -> Tensor:
            group = Group(*members)
            return self._decode(group, kept or self._encode(group), self._near(group) if near is None else near)

        if self.config.paths.coarse:
            shared = [*self.encoder.parameters(), *self.restriction.parameters()]
            own = group_by_group(restrict, groups, shared, arrival.in_order([group.patches for group in groups]))
            wait, couple = self._start_coupling(own, sigma, embedding, coupling, execution)
        near = self._near(groups[0]) if len(groups) == 1 else None
        if self.config.paths.coarse:
            told = self._tell(groups[0], lag(wait, couple) if lag else couple(wait()))
            groups = [group._replace(tokens=told.tokens, fine=told.fine, linear=told.linear) for group in groups]
        if objective is None:
            return group_by_group(decode, groups, self.parameters(), home=x.device)
        return sum_of_groups(decode, groups, self.parameters(), objective)

    def _groups(
        self, windows: Tensor, sigma: Tensor, embedding: Tensor, coupling: Coupling, execution: ExecutionConfig | None
    ) -> list[Group]:
        """The own patches in groups, in order."""
        most, precision = windows.shape[1], windows.dtype
        if execution is not None:
            most = execution.patches_at_once or most
            precision = torch.bfloat16 if execution.precision == "bfloat16" else precision
        return [
            Group(coupling.decomposition, coupling.patches[i * most :][:most], part, sigma, embedding.to(precision))
            for i, part in enumerate(windows.split(most, dim=1))
        ]

    def _encode(self, group: Group) -> Features:
        """The features of a group on all levels of the U-Net."""
        windows, config = group.windows, self.config
        place = coordinate_features(group.grid, group.patches, config.reach, config.positions, windows.device).to(windows)
        return Features(*self.encoder(windows, place, group.sigma, group.embedding))

    def _restrict(self, group: Group, features: Features) -> Tensor:
        """The tokens of a group, with shape ``[sample, patch, q^d, feature]``."""
        return self.restriction(features.latent.to(group.windows), group.windows, group.sigma, self.config.reach, self.overlap)

    def _shards(self, execution: ExecutionConfig | None, grid: Decomposition) -> bool:
        """Whether every rank transforms the tokens of its own patches only: by their number, whatever that of ranks is."""
        wanted, tokens = (execution or ExecutionConfig()).coarse, grid.num_patches * self.config.tokens**grid.ndim
        return self.config.paths.coarse == "transformer" and (
            wanted == "sharded" or (wanted == "auto" and tokens >= SHARDED_FROM)
        )

    def _start_coupling(
        self, own: Tensor, sigma: Tensor, embedding: Tensor, coupling: Coupling, execution: ExecutionConfig | None
    ) -> tuple[Callable[[], Tensor], Callable[[Tensor], Message]]:
        """Send the own tokens. Returns what waits for those to be transformed, and what makes a message of them. Collective."""
        sharded = self._shards(execution, coupling.decomposition)

        def couple(tokens: Tensor) -> Message:
            return self._speak(*self._transform(tokens, embedding, coupling, sharded), sigma)

        return (lambda: own) if sharded else coupling.start_gather(own), couple

    def _transform(self, tokens: Tensor, embedding: Tensor, coupling: Coupling, sharded: bool) -> tuple[Tensor, Tensor]:
        """Transform tokens. Collective.

        Arguments:
            tokens: Of all patches, or, where that is sharded, of the own ones, with shape ``[sample, patch, q^d, feature]``.
            embedding: Shape ``[sample, embedding]``.
            coupling: How to reach other patches.
            sharded: Whether the own tokens are transformed only, before the gather.

        Returns:
            Coupled tokens in place, and the means among the tokens: shapes ``[sample, *token_grid, width]``, ``[..., channel]``.
        """
        grid, q = coupling.decomposition, self.config.tokens
        patches = slice(coupling.patches[0], coupling.patches[-1] + 1) if sharded else slice(grid.num_patches)
        places = from_canvas(self._token_features(grid, tokens)[None], grid.patch_grid, q)[:, patches]
        inputs = torch.cat([tokens, places.expand(len(tokens), -1, -1, -1)], dim=-1)
        if isinstance(self.coarse, CoarseTransformer):
            audience = self._audience(coupling, patches, tokens, sharded)
            coupled = self.coarse(inputs.flatten(1, 2), embedding, audience).unflatten(1, inputs.shape[1:3])
        else:
            canvas = self.coarse(to_canvas(inputs, grid.patch_grid, q), embedding, self.periodic)
            coupled = from_canvas(canvas, grid.patch_grid, q)
        known = torch.cat([coupled, tokens[..., tokens.shape[-1] - self.restriction.means * self.channels :]], dim=-1)
        found = to_canvas(coupling.gather(known) if sharded else known, grid.patch_grid, q)
        return found[..., : coupled.shape[-1]], found[..., coupled.shape[-1] :]

    def _audience(self, coupling: Coupling, patches: slice, like: Tensor, sharded: bool) -> Audience:
        """Which tokens attend to which means, in the order of patches."""
        grid, q = coupling.decomposition, self.config.tokens
        token_grid = [n * q for n in grid.patch_grid]
        places = from_canvas(token_places(token_grid, like.device)[None].to(like), grid.patch_grid, q)
        lengths = closing_lengths(token_grid, self.periodic, like)

        def pool(rows: Tensor) -> Tensor:
            return mean_blocks(rows, q, self.config.keys, grid.ndim)

        def gather(rows: Tensor) -> Tensor:
            return coupling.gather(rows.unflatten(1, (len(coupling.patches), -1))).flatten(1, 2) if sharded else rows

        return Audience(places[0, patches].flatten(0, 1), pool(places.flatten(1, 2))[0], lengths, pool, gather)

    def _speak(self, coupled: Tensor, means: Tensor, sigma: Tensor) -> Message:
        """What the coarse level tells all patches, from coupled tokens and means in place (:meth:`_transform`)."""
        linear = None
        if self.linear is not None and self.linear.cell is not None:
            kernels = [weighting(m, overlap) for m, overlap in zip(self.linear.cell, self.overlap, strict=True)]
            scale = mean_scale(sigma, kernels).view(-1, *(1,) * (means.ndim - 1))
            linear = self.linear.coarse(means / scale, sigma)
        return Message(sigma, coupled, self.prolongation.fine(coupled), linear)

    def _tell(self, group: Group, message: Message) -> Group:
        """The group with a message; L u is of the same size in D = c_skip x + c_out F as when the message was made."""
        if message.linear is None:
            return group._replace(tokens=message.tokens, fine=message.fine)
        before, now = (s / (1 + s.square()).sqrt() for s in (message.sigma, group.sigma))
        linear = message.linear * (before / now).view(-1, *(1,) * (message.linear.ndim - 1))
        return group._replace(tokens=message.tokens, fine=message.fine, linear=linear)

    def _near(self, group: Group) -> Tensor | None:
        """The fine part of L u on a group, with shape ``[sample, patch, channel, *patch_shape]``."""
        return None if self.linear is None else self.linear.fine(group.windows, group.sigma, self.config.reach)

    def _decode(self, group: Group, features: Features, near: Tensor | None) -> Tensor:
        """The result on a group, N or L u + g N, with shape ``[sample, patch, channel, *patch_shape]``."""
        latent, fine = features.latent, []
        if group.tokens is not None:
            own = own_boxes(group.tokens, group.grid, group.patches, [self.config.tokens] * group.grid.ndim)
            latent = latent + self.prolongation.latent(own.flatten(0, 1), latent.shape[2:]).to(latent)
        if group.fine is not None:
            fine = [splines(group.fine, group.grid, group.patches, rim=self.decoder.rim)]
        latent = self.bottleneck(latent, group.embedding)
        out = self.decoder(latent, features.skips, group.embedding, fine)
        out = out.to(group.windows).unflatten(0, group.windows.shape[:2])
        if self.linear is not None:
            out = self.linear.scale(group.sigma).view(-1, *(1,) * (out.ndim - 1)) * out
        if near is not None:
            out = near + out
        if group.linear is None:
            return out
        return out + splines(group.linear, group.grid, group.patches, DEGREE).points().unflatten(0, out.shape[:2])

    def _token_features(self, decomposition: Decomposition, like: Tensor) -> Tensor:
        """Coordinates of all tokens, with shape ``[*token_grid, feature]``: those of a grid with a point per token."""
        token_grid = tuple(n * self.config.tokens for n in decomposition.patch_grid)
        tokens = Decomposition(token_grid, token_grid, 1, decomposition.periodic)
        return coordinate_features(tokens, [0], 0, self.config.positions, like.device)[0].movedim(0, -1).to(like)


def count_parameters(module: nn.Module) -> int:
    """Number of trainable numbers."""
    return sum(math.prod(p.shape) for p in module.parameters() if p.requires_grad)
