"""The halo of the own patches: which box of which neighbour goes where, and the copy and its adjoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpatch.decomposition import Decomposition, Index
from ddpatch.errors import UserError
from ddpatch.model.coupling import Arrival
from ddpatch.parallel.comm import Communicator
from ddpatch.tables import keep

Box = tuple[slice, ...]
ALL = slice(None)


class Move(NamedTuple):
    """The halo of some patches in one direction.

    Attributes:
        offset: Direction from the receiving patch to the sending one.
        patches: Local numbers of the patches on this rank (sending or receiving).
    """

    offset: Index
    patches: tuple[int, ...]


@keep
def places(patches: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers of patches as an index on the device."""
    return torch.tensor(patches, device=device)


def routes(decomposition: Decomposition, rank: int, offset: Index) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Who sends to whom, where every patch receives from its neighbour in direction ``offset``.

    Returns:
        Local numbers of this rank's patches, by the rank that they are sent to, and by the rank that they receive from. Both ends
        of a message list its pieces by receiving patch.
    """
    own, opposite = decomposition.local_patches(rank), tuple(-o for o in offset)
    outgoing: dict[int, list[int]] = defaultdict(list)
    incoming: dict[int, list[int]] = defaultdict(list)
    receivers = ((decomposition.neighbour(patch, opposite), patch) for patch in own)
    for receiver, patch in sorted((r, p) for r, p in receivers if r is not None):
        outgoing[decomposition.owner(receiver)].append(patch - own.start)
    for patch in own:
        sender = decomposition.neighbour(patch, offset)
        if sender is not None:
            incoming[decomposition.owner(sender)].append(patch - own.start)
    return outgoing, incoming


class Halo:
    """The plan of the halo exchange of one rank, made without communication.

    Both ends of a message list its pieces in the same order: by direction, then as :func:`routes` says.

    Arguments:
        decomposition: The grid, its patches and their owners.
        rank: The rank whose plan this is.
        width: Halo width δ in points.

    Raises:
        UserError: if the halo is wider than a patch.
    """

    def __init__(self, decomposition: Decomposition, rank: int, width: int) -> None:
        if width > min(decomposition.patch_shape):
            raise UserError(f"model.halo: {width} points are wider than the patch {list(decomposition.patch_shape)}")
        self.rank, self.width, self.shape = rank, width, decomposition.patch_shape
        self._sends: dict[int, list[Move]] = defaultdict(list)
        self._receives: dict[int, list[Move]] = defaultdict(list)
        if width:
            self._plan(decomposition)
        own = decomposition.local_patches(rank)
        waiting = {p for peer, moves in self._receives.items() if peer != rank for move in moves for p in move.patches}
        self._ready = frozenset(own) - {own.start + p for p in waiting}

    def _plan(self, decomposition: Decomposition) -> None:
        for offset in decomposition.offsets:
            outgoing, incoming = routes(decomposition, self.rank, offset)
            for peer, patches in outgoing.items():
                self._sends[peer].append(Move(offset, tuple(patches)))
            for peer, patches in incoming.items():
                self._receives[peer].append(Move(offset, tuple(patches)))

    def start(self, patches: Tensor, comm: Communicator) -> Arrival:
        """Begin the exchange that makes windows of the own patches; what these give each other is there at once. Collective.

        Arguments:
            patches: Shape ``[sample, local patch, channel, *patch_shape]``.

        Returns:
            Windows, with shape ``[sample, local patch, channel, *(patch_shape + 2 δ)]``, zero beyond walls.
        """
        if not self.width:
            return Arrival(patches, self._ready, lambda: None)
        windows = patches.new_zeros(*patches.shape[:3], *(n + 2 * self.width for n in self.shape))
        windows[_at(self._interior())] = patches
        outgoing = {peer: _pack(patches, moves, self._edge) for peer, moves in self._sends.items()}
        own = {peer: outgoing.pop(peer) for peer in {self.rank} & outgoing.keys()}
        wait = self._start(outgoing, {peer: moves for peer, moves in self._receives.items() if peer != self.rank}, windows, comm)
        self._fill(windows, own)

        return Arrival(windows, self._ready, lambda: self._fill(windows, wait()))

    def _fill(self, windows: Tensor, received: Mapping[int, Tensor]) -> None:
        """Put what came from some ranks where it belongs."""
        for peer, message in received.items():
            for move, piece in self._unpack(message, self._receives[peer], windows):
                windows[_at(self._ring(move.offset), places(move.patches, windows.device))] = piece

    def add(self, windows: Tensor, comm: Communicator) -> Tensor:
        """The adjoint of :meth:`start`: the windows' halos are added onto the patches that they came from. Collective.

        Arguments:
            windows: Shape ``[sample, local patch, channel, *(patch_shape + 2 δ)]``.

        Returns:
            Shape ``[sample, local patch, channel, *patch_shape]``.
        """
        if not self.width:
            return windows
        patches = windows[_at(self._interior())].clone()
        outgoing = {peer: _pack(windows, moves, self._ring) for peer, moves in self._receives.items()}
        received = self._start(outgoing, self._sends, windows, comm)()
        for peer, moves in self._sends.items():
            for move, piece in self._unpack(received[peer], moves, windows):
                patches[_at(self._edge(move.offset), places(move.patches, patches.device))] += piece
        return patches

    def _start(
        self, outgoing: dict[int, Tensor], receives: dict[int, list[Move]], like: Tensor, comm: Communicator
    ) -> Callable[[], dict[int, Tensor]]:
        incoming = {peer: like.new_empty(sum(self._sizes(moves, like))) for peer, moves in receives.items()}
        return comm.start_exchange(outgoing, incoming, kind="halo")

    def _unpack(self, message: Tensor, moves: list[Move], like: Tensor) -> Iterable[tuple[Move, Tensor]]:
        for move, flat in zip(moves, message.split(self._sizes(moves, like)), strict=True):
            yield move, flat.view(like.shape[0], len(move.patches), like.shape[2], *self._extent(move.offset))

    def _sizes(self, moves: list[Move], like: Tensor) -> list[int]:
        per_patch = like.shape[0] * like.shape[2]
        return [per_patch * len(m.patches) * torch.Size(self._extent(m.offset)).numel() for m in moves]

    def _extent(self, offset: Index) -> Index:
        return tuple(self.width if o else n for o, n in zip(offset, self.shape, strict=True))

    def _interior(self) -> Box:
        return tuple(slice(self.width, self.width + n) for n in self.shape)

    def _edge(self, offset: Index) -> Box:
        """The box of the sending patch: its low edge for an upper neighbour, its high edge for a lower one."""
        low, high = slice(0, self.width), slice(-self.width, None)
        return tuple(ALL if o == 0 else low if o > 0 else high for o in offset)

    def _ring(self, offset: Index) -> Box:
        """The box of the receiving window, in the halo."""
        low, high = slice(0, self.width), slice(-self.width, None)
        inner = self._interior()
        return tuple(inner[a] if o == 0 else high if o > 0 else low for a, o in enumerate(offset))


def _at(box: Box, patches: Tensor | slice = ALL) -> tuple[Any, ...]:
    """Index of a box in some patches of ``[sample, local patch, channel, *points]``."""
    return (ALL, patches, ALL, *box)


def _pack(tensor: Tensor, moves: list[Move], box: Callable[[Index], Box]) -> Tensor:
    parts = ((box(move.offset), places(move.patches, tensor.device)) for move in moves)
    return torch.cat([tensor[_at(*part)].reshape(-1) for part in parts])
