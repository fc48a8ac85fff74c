"""Differentiable communication of stacked patches: the token gather and the halo exchange, with their adjoints.

Gradient convention. L is the sum over ranks of local losses, each the sum over own patches divided by the *global* element
count. Parameters are replicated and their gradients are summed over the ranks that share a sample. Hence the adjoint of the
gather is a reduce-scatter that sums, the adjoint of a halo copy is a halo addition, and an all-reduced loss is reported
detached, never differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddpatch.decomposition import Decomposition
from ddpatch.model.coupling import Arrival
from ddpatch.parallel.comm import Communicator
from ddpatch.parallel.halo import Halo


class _GatherTokens(torch.autograd.Function):
    """Forward: allgather along the patch dim. Backward: reduce-scatter (sum)."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, comm: Communicator, counts: tuple[int, ...], wait: Callable[[], Tensor]) -> Tensor:
        ctx.comm, ctx.counts = comm, counts
        return wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.comm.reduce_scatter(grads[0], ctx.counts), None, None, None


class _ExchangeHalo(torch.autograd.Function):
    """Forward: the windows that are being filled. Backward: add the windows' borders onto the neighbours."""

    @staticmethod
    def forward(ctx: Any, patches: Tensor, comm: Communicator, halo: Halo, windows: Tensor) -> Tensor:
        ctx.comm, ctx.halo = comm, halo
        return windows.data  # unlike detach(), with a version of its own: that they are filled later is no change to autograd

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.halo.add(grads[0], ctx.comm), None, None, None


class Exchange:
    """The two communications of one denoiser evaluation, over the patches of a decomposition.

    Arguments:
        decomposition: The grid, its patches and their owners.
        comm: The ranks that share a sample; as many as the decomposition has.
        width: Halo width δ in points, at most the patch's smallest side.
    """

    def __init__(self, decomposition: Decomposition, comm: Communicator, width: int) -> None:
        self.decomposition, self.comm = decomposition, comm
        self.patches = decomposition.local_patches(comm.rank)
        self._halo = Halo(decomposition, comm.rank, width)

    def gather(self, tokens: Tensor) -> Tensor:
        """All patches' tokens from the own patches' tokens. Collective.

        Arguments:
            tokens: Own tokens, with shape ``[sample, local patch, ...]``.

        Returns:
            Tokens of all patches in global order, with shape ``[sample, patch, ...]``.
        """
        return self.start_gather(tokens)()

    def start_gather(self, tokens: Tensor) -> Callable[[], Tensor]:
        """Begin a :meth:`gather`; what is returned waits for it. Collective."""
        rows, counts = tokens.transpose(0, 1).contiguous(), self.decomposition.counts
        wait = self.comm.start_allgather(rows, counts)
        return lambda: _GatherTokens.apply(rows, self.comm, counts, wait).transpose(0, 1)

    def halo(self, patches: Tensor) -> Tensor:
        """Windows of the own patches: the patch with δ points of its neighbours on every side, zero beyond walls. Collective.

        Arguments:
            patches: Own patches, with shape ``[sample, local patch, channel, *patch_shape]``.

        Returns:
            Windows with shape ``[sample, local patch, channel, *(patch_shape + 2 δ)]``.
        """
        arrival = self.start_halo(patches)
        arrival.wait()
        return arrival.windows

    def start_halo(self, patches: Tensor) -> Arrival:
        """Begin a :meth:`halo`. Collective."""
        arrival = self._halo.start(patches.detach(), self.comm)
        return arrival._replace(windows=_ExchangeHalo.apply(patches, self.comm, self._halo, arrival.windows))
