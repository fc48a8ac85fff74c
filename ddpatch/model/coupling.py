"""What the network is given to reach other patches, and what stands for it where there are none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from ddpatch.decomposition import Decomposition


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
