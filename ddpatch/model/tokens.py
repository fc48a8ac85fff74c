"""Between the levels: restriction of patches to tokens, and prolongation of tokens to patches.

A token stands for a cell of m points per axis. The field reaches it through weighted means with the kernel box(m) * box(w), the
full weighting of multigrid methods: neighbouring cells overlap, so that waves that the tokens cannot resolve, and the noise in
them, are damped before they are mistaken for longer ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from ddpatch.decomposition import Decomposition
from ddpatch.errors import UserError
from ddpatch.model.convolution import CONV
from ddpatch.model.interpolation import Interpolation, along
from ddpatch.tables import keep


class Restriction(nn.Module):
    """q^d tokens per patch: compressed latent features, and weighted means of the field.

    The means let the coarse level see the field at high noise, where the mean over a token's cell has far less noise than a
    point. They are scaled to about unit variance (:func:`mean_scale`).

    Arguments:
        ndim: 2 or 3.
        latent: Channels of the latent.
        features: Latent features that a token carries.
        tokens: Tokens per axis, q.
        means: Whether tokens carry means at all.
    """

    def __init__(self, ndim: int, latent: int, features: int, tokens: int, means: bool = True) -> None:
        super().__init__()
        self.shape, self.means = (tokens,) * ndim, means
        self.compress = CONV[ndim](latent, features, 1)

    def forward(self, latent: Tensor, windows: Tensor, sigma: Tensor, margin: int, overlap: Sequence[int]) -> Tensor:
        """Restrict.

        Arguments:
            latent: Shape ``[sample * patch, latent, *latent_shape]``.
            windows: The scaled field c_in x, with shape ``[sample, patch, channel, *(patch_shape + 2 margin)]``.
            sigma: Shape ``[sample]``.
            margin: Halo of the windows.
            overlap: Points of it, per axis, that may enter means.

        Returns:
            Shape ``[sample, patch, q^d, features + channel]``.
        """
        features = pool(self.compress(latent), self.shape).unflatten(0, windows.shape[:2])
        if not self.means:
            return features.flatten(3).transpose(2, 3)
        means, cells = windows, []
        for axis, (points, q, most) in enumerate(zip(windows.shape[3:], self.shape, overlap, strict=True), start=3):
            cell = (points - 2 * margin) // q
            cells.append(weighting(cell, most))
            means = along(means, axis, averages(cell, most, points, margin, windows.device))
        scale = mean_scale(sigma, cells).view(-1, *(1,) * (windows.ndim - 1))
        return torch.cat([features, means * scale], dim=2).flatten(3).transpose(2, 3)


class Prolongation(nn.Module):
    """Tokens to points: piecewise constant at the latent's resolution, and smooth across patch borders at the finest one.

    Arguments:
        ndim: 2 or 3.
        width: Width of a token.
        latent, fine: Channels at the latent and at the finest level; 0 at a level that is not reached.
    """

    def __init__(self, ndim: int, width: int, latent: int, fine: int) -> None:
        super().__init__()
        self.to_latent = nn.Linear(width, latent)
        self.to_fine = nn.Linear(width, fine) if fine else None

    def latent(self, own: Tensor, shape: Sequence[int]) -> Tensor:
        """Map own tokens ``[batch, q, (q,) q, width]`` to ``[batch, latent, *shape]``."""
        return pool(self.to_latent(own).movedim(-1, 1), shape)

    def fine(self, canvas: Tensor) -> Tensor | None:
        """Map all tokens in place ``[sample, *token_grid, width]`` to spline coefficients ``[sample, *token_grid, fine]``.

        :func:`splines` of degree 2 interpolate with them between token centres, through the neighbours' tokens. ``None`` where
        the finest level is not reached.
        """
        return None if self.to_fine is None else self.to_fine(canvas)


def splines(canvas: Tensor, decomposition: Decomposition, patches: Sequence[int], degree: int = 2, rim: int = 0) -> Interpolation:
    """B-splines with coefficients on the tokens, at the points of some patches.

    Arguments:
        canvas: Coefficients of all tokens in place, with shape ``[sample, *token_grid, channel]``.
        decomposition: The grid and its patches.
        patches: Global numbers of the patches.
        degree: Of the splines.
        rim: Points around every patch that are wanted too.

    Returns:
        What is interpolated to ``[sample * patch, channel, *(patch_shape + 2 rim)]``.
    """
    per_patch = [n // g for n, g in zip(canvas.shape[1:-1], decomposition.patch_grid, strict=True)]
    cells = [n // q for n, q in zip(decomposition.patch_shape, per_patch, strict=True)]
    ring = neighbours(degree, rim, min(cells))
    framed = frame(canvas.movedim(-1, 1), decomposition.periodic, ring).movedim(1, -1)
    boxes = own_boxes(framed, decomposition, patches, per_patch, 2 * ring).flatten(0, 1)
    weights = [spline_weights(q, cell, degree, ring, rim, canvas.device) for cell, q in zip(cells, per_patch, strict=True)]
    return Interpolation(boxes, weights)


def weighting(cell: int, overlap: int) -> Tensor:
    """The kernel of a weighted mean, box(m) * box(w): w odd, at most m or one more, and no wider than the overlap permits.

    Arguments:
        cell: m, points of a cell.
        overlap: Points beyond the cell on either side that may enter.

    Returns:
        Shape ``[m + w - 1]``, double precision, with sum 1.
    """
    w = 2 * min(overlap, cell // 2) + 1
    return F.conv1d(torch.full((1, 1, cell), 1 / cell).double(), torch.full((1, 1, w), 1 / w).double(), padding=w - 1)[0, 0]


@keep
def averages(cell: int, overlap: int, points: int, margin: int, device: torch.device) -> Tensor:
    """The weighted means of the q cells of a window along one axis, as a matrix with shape ``[points, q]``."""
    kernel, q = weighting(cell, overlap), (points - 2 * margin) // cell
    first = margin - (len(kernel) - cell) // 2
    matrix = kernel.new_zeros(points, q)
    for i in range(q):
        matrix[first + i * cell : first + i * cell + len(kernel), i] = kernel
    return matrix.to(device)


def mean_scale(sigma: Tensor, kernels: Sequence[Tensor]) -> Tensor:
    """sqrt((1 + σ²) / (1 + σ² Σ h²)): brings means of the scaled field c_in x to about unit variance, with shape ``[sample]``.

    Arguments:
        sigma: Shape ``[sample]``.
        kernels: h along each axis.
    """
    square, noise = sigma.square(), math.prod(float(h.square().sum()) for h in kernels)
    return ((1 + square) / (1 + square * noise)).sqrt()


def bspline(distances: Tensor, degree: int) -> Tensor:
    """The B-spline β_n at distances t from its middle, in token spacings, by the recursion of Cox and de Boor:

        β_n(t) = [(h + t) β_{n-1}(t + 1/2) + (h - t) β_{n-1}(t - 1/2)] / n,   h = (n + 1) / 2,   β_0 = 1 on [-1/2, 1/2).

    It has n - 1 derivatives and vanishes from |t| = h on; with n > 0 linear functions are reproduced.
    """
    if degree == 0:
        return ((distances >= -0.5) & (distances < 0.5)).to(distances)
    half = (degree + 1) / 2
    below, above = bspline(distances + 0.5, degree - 1), bspline(distances - 0.5, degree - 1)
    return ((half + distances) * below + (half - distances) * above) / degree


def neighbours(degree: int, rim: int = 0, cell: int = 1) -> int:
    """Tokens beyond a patch, on either side, whose splines reach its points and those of a rim around it."""
    return (degree + 1) // 2 + -(-rim // cell)


@keep
def spline_weights(q: int, cell: int, degree: int, ring: int, rim: int, device: torch.device) -> Tensor:
    """B-splines of q tokens and some neighbours on either side, at the q * cell points between, along one axis.

    Arguments:
        q: Tokens of the patch along the axis.
        cell: Points per token.
        degree: Of the splines.
        ring: Neighbours, at least :func:`neighbours`.
        rim: Points beyond the patch, on either side.
        device: Where they are wanted.

    Returns:
        Weights with shape ``[q + 2 ring, q * cell + 2 rim]``; every column sums to 1.
    """
    points = (torch.arange(-rim, q * cell + rim, dtype=torch.float64, device=device) + 0.5) / cell - 0.5
    return bspline(points[None] - torch.arange(-ring, q + ring, dtype=torch.float64, device=device)[:, None], degree)


def frame(canvas: Tensor, periodic: Sequence[bool], width: int = 1) -> Tensor:
    """Add tokens on every side: those of the opposite side on periodic axes, the last one again at walls.

    Arguments:
        canvas: Shape ``[sample, channel, *token_grid]``.
        periodic: Per axis.
        width: Tokens to add.
    """
    for axis, wraps in enumerate(periodic, start=2):
        n = canvas.shape[axis]
        places = torch.arange(-width, n + width, device=canvas.device)
        canvas = canvas.index_select(axis, places.remainder(n) if wraps else places.clamp(0, n - 1))
    return canvas


def to_canvas(tokens: Tensor, patch_grid: Sequence[int], q: int) -> Tensor:
    """Put tokens in place: ``[sample, patch, q^d, feature]`` to ``[sample, *token_grid, feature]``."""
    if len(patch_grid) == 2:
        y, x = patch_grid
        return rearrange(tokens, "b (y x) (j i) c -> b (y j) (x i) c", y=y, x=x, j=q, i=q)
    z, y, x = patch_grid
    return rearrange(tokens, "b (z y x) (k j i) c -> b (z k) (y j) (x i) c", z=z, y=y, x=x, k=q, j=q, i=q)


def from_canvas(canvas: Tensor, patch_grid: Sequence[int], q: int) -> Tensor:
    """The inverse of :func:`to_canvas`."""
    if len(patch_grid) == 2:
        return rearrange(canvas, "b (y j) (x i) c -> b (y x) (j i) c", j=q, i=q)
    return rearrange(canvas, "b (z k) (y j) (x i) c -> b (z y x) (k j i) c", k=q, j=q, i=q)


def mean_blocks(tokens: Tensor, q: int, keys: int, ndim: int) -> Tensor:
    """Means over blocks of the tokens of every patch.

    Arguments:
        tokens: Of any patches, one after the other, with shape ``[sample, patch * q^d, feature]``.
        q, keys: Tokens and blocks of a patch, per axis.
        ndim: Axes, d.

    Returns:
        Shape ``[sample, patch * keys^d, feature]``.
    """
    m, each = keys, q // keys
    if ndim == 2:
        return reduce(tokens, "b (p y j x i) c -> b (p y x) c", "mean", y=m, x=m, j=each, i=each)
    return reduce(tokens, "b (p z k y j x i) c -> b (p z y x) c", "mean", z=m, y=m, x=m, k=each, j=each, i=each)


def own_boxes(canvas: Tensor, decomposition: Decomposition, patches: Sequence[int], q: Sequence[int], ring: int = 0) -> Tensor:
    """The tokens of some patches, and ``ring`` more at the end of every axis.

    Arguments:
        canvas: Tokens in place, with shape ``[sample, *token_grid, feature]``.
        decomposition: The grid and its patches.
        patches: Global numbers of the patches.
        q: Tokens per patch, by axis.
        ring: Additional tokens per axis.

    Returns:
        Shape ``[sample, patch, *(q + ring), feature]``.
    """
    boxes = []
    for patch in patches:
        place = zip(decomposition.position(patch), q, strict=True)
        box: tuple[Any, ...] = (slice(None), *(slice(i * n, i * n + n + ring) for i, n in place))
        boxes.append(canvas[box])
    return torch.stack(boxes, dim=1)


def check_tokens(patch_shape: Sequence[int], q: int, levels: int) -> None:
    """Raise a UserError unless q divides the patch and the U-Net's levels fit into it."""
    for n in patch_shape:
        if n % q:
            raise UserError(f"model.tokens: {q} tokens per axis do not divide the patch {list(patch_shape)}")
        if n % 2 ** (levels - 1):
            least = 2 ** (levels - 1)
            raise UserError(f"model.channels: {levels} levels need a domain.patch divisible by {least}, got {list(patch_shape)}")


def pool(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Means over equal blocks, or repetition where these are more than the points.

    Arguments:
        x: Shape ``[batch, channel, *points]``.
        shape: Blocks per axis.

    Returns:
        Shape ``[batch, channel, *shape]``, channels last in memory.
    """
    x = x.movedim(1, -1)
    for axis, n in enumerate(shape, start=1):
        if x.shape[axis] != n:
            x = along(x, axis, pooling(x.shape[axis], n, x.device))
    return x.movedim(-1, 1)


@keep
def pooling(points: int, blocks: int, device: torch.device) -> Tensor:
    """Means over the points that meet each of equal blocks, along one axis: weights with shape ``[points, blocks]``."""
    matrix = torch.zeros(points, blocks, dtype=torch.float64)
    for j in range(blocks):
        first, last = j * points // blocks, -(-(j + 1) * points // blocks)
        matrix[first:last, j] = 1 / (last - first)
    return matrix.to(device)
