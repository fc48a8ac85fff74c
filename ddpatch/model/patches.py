"""A whole field as its patches, and back. For one rank: tests, benchmarks and oracles; runs never hold a whole field."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ddpatch.decomposition import Decomposition


def cut(field: Tensor, decomposition: Decomposition, patches: Iterable[int] | None = None) -> Tensor:
    """``[sample, channel, *grid]`` to ``[sample, patch, channel, *patch_shape]``, all patches or some."""
    numbers = range(decomposition.num_patches) if patches is None else patches
    return torch.stack([field[within(decomposition, p)] for p in numbers], dim=1)


def join(patches: Tensor, decomposition: Decomposition) -> Tensor:
    """The inverse of :func:`cut` for all patches."""
    field = patches.new_empty(len(patches), patches.shape[2], *decomposition.grid_shape)
    for p in range(decomposition.num_patches):
        field[within(decomposition, p)] = patches[:, p]
    return field


def within(decomposition: Decomposition, patch: int) -> Any:
    """Index of a patch in ``[..., *grid]``."""
    return (..., *decomposition.slices(patch))
