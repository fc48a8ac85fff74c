"""Ranks that are not there: a communicator for tensors without memory, which counts what a rank among them would send."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ddpatch.parallel.comm import Communicator

META = torch.device("meta")


class Nowhere:
    """A :class:`ddpatch.parallel.transport.Transport` that makes room for what would arrive, and sends nothing."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def start_allgather(self, rows: Tensor, counts: Sequence[int]) -> Callable[[], Tensor]:
        """Room for the rows of all ranks."""
        received = rows.new_empty(sum(counts), *rows.shape[1:])
        return lambda: received

    def reduce_scatter(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Room for the own rows."""
        return rows.new_empty(counts[self.rank], *rows.shape[1:])

    def allreduce(self, tensor: Tensor) -> Tensor:
        """Room for the sum."""
        return torch.empty_like(tensor)

    def start_sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Room for the sum beside the tensor until both are waited for."""
        sent, received = tensor, torch.empty_like(tensor)
        return lambda: (sent, received)[1]

    def start_exchange(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> Callable[[], dict[int, Tensor]]:
        """Room for the messages."""
        received = {rank: torch.empty_like(like) for rank, like in incoming.items()}
        return lambda: received

    def close(self) -> None:
        """Nothing is held."""


class ImaginedRanks(Communicator):
    """A communicator of ranks that are not there. It counts as any other does.

    Arguments:
        rank, size: Whom this process plays, and of how many.
        group: Ranks of a domain group.
    """

    def __init__(self, rank: int, size: int, group: int, deterministic: bool = False) -> None:
        super().__init__(deterministic=deterministic)
        self.rank, self.size, self.group = rank, size, group
        self.transport, self.device = Nowhere(rank), META

    def place(self, device: str = "auto", share: bool = False) -> torch.device:
        """Tensors without memory."""
        return META

    def connect(self, transport: str, device: torch.device) -> None:
        """Whatever the transport, nothing is sent."""

    def split(self, color: int) -> Communicator:
        """The domain group of this rank."""
        return ImaginedRanks(self.rank % self.group, self.group, self.group, self.deterministic)
