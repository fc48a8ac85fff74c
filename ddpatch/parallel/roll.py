"""Rolling a grid under its patches: the tiling moves, the patches stay where they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpatch.decomposition import Decomposition
from ddpatch.parallel.comm import Communicator
from ddpatch.parallel.halo import places, routes


def roll(patches: Tensor, shifts: Sequence[int], decomposition: Decomposition, comm: Communicator) -> Tensor:
    """The own patches of the field y(i) = x(i + s), with one exchange between neighbours per axis that moves. Collective.

    Arguments:
        patches: Own patches of x, with shape ``[sample, local patch, channel, *patch_shape]``.
        shifts: s, per axis, in points: less than a patch either way, and 0 along axes with walls.
        decomposition: The grid and its patches.
        comm: The ranks that share the grid.

    Raises:
        ValueError: for a shift that is too large, or along an axis with walls.
    """
    for axis, (shift, n, wraps) in enumerate(zip(shifts, decomposition.patch_shape, decomposition.periodic, strict=True)):
        if abs(shift) >= n or (shift and not wraps):
            raise ValueError(f"a shift by {shift} along axis {axis}, with patches of {n} points, periodic: {wraps}")
        if shift:
            patches = _roll_axis(patches, axis, shift, decomposition, comm)
    return patches


def _roll_axis(patches: Tensor, axis: int, shift: int, decomposition: Decomposition, comm: Communicator) -> Tensor:
    """Every patch drops |s| slices at one end, and takes as many from the neighbour at the other."""
    dim = 3 + axis
    kept, dropped = _ends(patches, dim, shift)
    offset = tuple((1 if shift > 0 else -1) * (a == axis) for a in range(decomposition.ndim))
    sends, receives = routes(decomposition, comm.rank, offset)
    outgoing = {peer: dropped.index_select(1, places(tuple(local), dropped.device)) for peer, local in sends.items()}
    incoming = {peer: dropped.new_empty(len(dropped), len(local), *dropped.shape[2:]) for peer, local in receives.items()}
    arrived = dropped.new_empty(dropped.shape)
    for peer, message in comm.exchange(outgoing, incoming, kind="roll").items():
        arrived[:, places(tuple(receives[peer]), arrived.device)] = message
    return torch.cat([kept, arrived] if shift > 0 else [arrived, kept], dim=dim)


def _ends(patches: Tensor, dim: int, shift: int) -> tuple[Tensor, Tensor]:
    """What a patch keeps, and what it drops: its low end for a positive shift."""
    n = patches.shape[dim]
    if shift > 0:
        return patches.narrow(dim, shift, n - shift), patches.narrow(dim, 0, shift)
    return patches.narrow(dim, 0, n + shift), patches.narrow(dim, n + shift, -shift)
