"""What a point knows of its place: Fourier features of the coordinates, and on which side of a wall it lies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ddpatch.decomposition import Decomposition


def num_coordinate_features(periodic: Sequence[bool], modes: int) -> int:
    """Number of channels of :func:`coordinate_features`."""
    return 2 * modes * len(periodic) + (not all(periodic))


def coordinate_features(
    decomposition: Decomposition, patches: Sequence[int], halo: int, modes: int, device: torch.device
) -> Tensor:
    """Fourier features of the coordinates of windows' points.

    For mode m = 1..modes and every axis with coordinate x in [0, 1): cos and sin of 2π m x on periodic axes, of π m x between
    walls, where they need not close. Where any axis has walls, a last channel is 1 inside the grid and 0 beyond.

    Arguments:
        decomposition: The grid and its patches.
        patches: Global numbers of the patches.
        halo: Points of the window on every side of the patch.
        modes: Number of modes; 0 for homogeneous data.
        device: Where they are wanted, and made, since a device would wait for a copy.

    Returns:
        Shape ``[patch, feature, *(patch_shape + 2 halo)]``.
    """
    return torch.stack([_window_features(decomposition, decomposition.start(p), halo, modes, device) for p in patches])


def _window_features(decomposition: Decomposition, start: Sequence[int], halo: int, modes: int, device: torch.device) -> Tensor:
    shape = tuple(n + 2 * halo for n in decomposition.patch_shape)
    features, inside = [], torch.ones(shape, device=device)
    for axis, wraps in enumerate(decomposition.periodic):
        points = torch.arange(shape[axis], device=device) + start[axis] - halo
        along = [1] * len(shape)
        along[axis] = -1
        x = ((points + 0.5) / decomposition.grid_shape[axis]).view(along)
        for mode in range(1, modes + 1):
            angle = (2 if wraps else 1) * math.pi * mode * x
            features += [angle.cos().expand(shape), angle.sin().expand(shape)]
        if not wraps:
            inside = inside * ((points >= 0) & (points < decomposition.grid_shape[axis])).view(along)
    if not all(decomposition.periodic):
        features.append(inside)
    return torch.stack(features) if features else torch.empty(0, *shape, device=device)
