"""How tensors travel through torch.distributed: NCCL between GPUs, gloo between CPUs, introduced to each other by MPI."""

from __future__ import annotations

import atexit
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ddpatch.parallel.transport import as_bytes, copied, settle

MEETING_LIMIT = timedelta(minutes=5)
NO_LIMIT = timedelta(weeks=2)  # longer than any job: a rank that dies ends the job through MPI, one that is slow is waited for


class TorchTransport:
    """Two process groups of torch.distributed, one of them for the sums that overlap with everything else.

    The groups belong to this transport: torch's default group is neither needed nor touched, so that the ranks of a communicator
    can connect without the others. On NCCL a result is there for all later work on the current stream, not yet for the host.

    Arguments:
        mpi: The raw MPI communicator whose ranks connect.
        device: This rank's; of the same type on all ranks, and where it is a GPU, one of its own for every rank.
    """

    def __init__(self, mpi: Any, device: torch.device) -> None:
        self._mpi, self.rank, self.size = mpi, mpi.rank, mpi.size
        self._store, self._nothing = open_store(mpi), torch.empty(0, dtype=torch.uint8, device=device)
        self._moves, self._sums = (self._group(name, device) for name in ("moves", "sums"))
        atexit.register(self.close)

    def _group(self, name: str, device: torch.device) -> Any:
        store = dist.PrefixStore(name, self._store)  # type: ignore[attr-defined]  # documented, but not declared
        if device.type == "cpu":
            return dist.ProcessGroupGloo(store, self.rank, self.size, NO_LIMIT)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = NO_LIMIT
        return dist.ProcessGroupNCCL(store, self.rank, self.size, options)

    def start_allgather(self, rows: Tensor, counts: Sequence[int]) -> Callable[[], Tensor]:
        """See :class:`~ddpatch.parallel.transport.Transport`. Collective."""
        sizes = [n * rows.shape[1:].numel() * rows.itemsize for n in counts]
        sent = _padded(as_bytes(rows.detach().contiguous()), max(sizes))
        received = [torch.empty_like(sent) for _ in sizes]
        work = self._moves.allgather([received], [sent])

        def finish() -> Tensor:
            work.wait()
            whole = torch.cat([part[:size] for part, size in zip(received, sizes, strict=True)])
            return whole.view(rows.dtype).view(sum(counts), *rows.shape[1:])

        return finish

    def reduce_scatter(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """See :class:`~ddpatch.parallel.transport.Transport`. Collective."""
        sent = [_padded(part, max(counts)) for part in rows.detach().contiguous().split(list(counts))]
        received = torch.empty_like(sent[0])
        self._moves.reduce_scatter([received], [sent]).wait()
        return received[: counts[self.rank]]

    def allreduce(self, tensor: Tensor) -> Tensor:
        """See :class:`~ddpatch.parallel.transport.Transport`. Collective."""
        total = copied(tensor)
        self._moves.allreduce([total]).wait()
        return total

    def start_sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        """See :class:`~ddpatch.parallel.transport.Transport`. Collective."""
        total = copied(tensor)
        return partial(_finish, self._sums.allreduce([total]), total)

    def start_exchange(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> Callable[[], dict[int, Tensor]]:
        """See :class:`~ddpatch.parallel.transport.Transport`. Nothing travels between ranks without a message. Collective."""
        sent = [as_bytes(outgoing[r].detach().contiguous()) if r in outgoing else self._nothing for r in range(self.size)]
        sizes = [incoming[r].nbytes if r in incoming else 0 for r in range(self.size)]
        together, received = torch.cat(sent), self._nothing.new_empty(sum(sizes))
        work = self._moves.alltoall_base(received, together, sizes, [len(message) for message in sent])
        return partial(_finish_exchange, work, together, received.split(sizes), incoming)

    def close(self) -> None:
        """Release the groups, once. Collective."""
        atexit.unregister(self.close)
        settle(self._nothing)  # a group that ends takes along what others still wait for
        self._moves.shutdown()
        self._sums.shutdown()
        self._mpi.Barrier()  # rank 0 keeps the store until nobody watches it
        del self._moves, self._sums, self._store  # gloo's threads end with their group; those of one that nobody uses may spin


def open_store(mpi: Any) -> Any:
    """The store in which groups find their members: a thread of rank 0, at a free port that it tells the others. Collective."""
    hosts = mpi.allgather(platform.node())
    host = hosts[0] if len(set(hosts)) > 1 else "127.0.0.1"  # in a container a name need not resolve
    store = partial(dist.TCPStore, host, wait_for_workers=False, timeout=MEETING_LIMIT)  # type: ignore[attr-defined]
    served = store(port=0, is_master=True) if mpi.rank == 0 else None
    port = mpi.bcast(served.port if served else None)
    return served or store(port=port, is_master=False)


def _padded(rows: Tensor, count: int) -> Tensor:
    """Rows with zero rows behind them, ``[count, ...]``: every rank sends as much as the others."""
    if len(rows) == count:
        return rows
    return torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])


def _finish(work: Any, total: Tensor) -> Tensor:
    work.wait()
    return total


def _finish_exchange(work: Any, sent: Tensor, received: Sequence[Tensor], incoming: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Wait for all messages; what is sent and what is received lives until then."""
    work.wait()
    pieces = [piece.clone() for piece in received]  # for a type needs aligned memory
    return {r: pieces[r].view(like.dtype).view(like.shape) for r, like in incoming.items()}
