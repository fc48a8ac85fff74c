"""How tensors travel through MPI: staged through host memory, or from where they are.

A transport moves tensors between the ranks of one communicator. It neither counts them nor knows what they mean, and it receives
raw MPI communicators, so that it needs no mpi4py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor


class Transport(Protocol):
    """What carries tensors between ranks; results are new tensors on the device of the arguments. All methods are collective.

    A method that starts something returns what waits for it. Leave the arguments alone until then.
    """

    def start_allgather(self, rows: Tensor, counts: Sequence[int]) -> Callable[[], Tensor]:
        """The rows of all ranks, ``[sum(counts), ...]``, from this rank's, ``[counts[rank], ...]``."""

    def reduce_scatter(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """This rank's rows of the sum, ``[counts[rank], ...]``, from rows for all ranks, ``[sum(counts), ...]``."""

    def allreduce(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, of any shape."""

    def start_sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        """An :meth:`allreduce` that overlaps with other methods."""

    def start_exchange(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> Callable[[], dict[int, Tensor]]:
        """Send a tensor to some other ranks and receive, from some others, one of the shape and type given there."""

    def close(self) -> None:
        """Release what the transport holds."""


class Alone:
    """One rank, whose results are copies of what it has: nothing leaves the device, and nothing is waited for."""

    def start_allgather(self, rows: Tensor, counts: Sequence[int]) -> Callable[[], Tensor]:
        """See :class:`Transport`."""
        return partial(copied, rows)

    def reduce_scatter(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """See :class:`Transport`."""
        return copied(rows)

    def allreduce(self, tensor: Tensor) -> Tensor:
        """See :class:`Transport`."""
        return copied(tensor)

    def start_sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        """See :class:`Transport`."""
        return partial(copied, tensor)

    def start_exchange(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> Callable[[], dict[int, Tensor]]:
        """See :class:`Transport`; there is no other rank to send to."""
        return dict

    def close(self) -> None:
        """Nothing is held."""


class HostTransport:
    """MPI from host memory: what is on a GPU is staged through pinned buffers, what is not is not copied.

    Arguments:
        moves: MPI communicator of everything but the sums that overlap.
        sums: MPI communicator of the same ranks, for these.
    """

    def __init__(self, moves: Any, sums: Any) -> None:
        self._moves, self._sums = moves, sums

    def start_allgather(self, rows: Tensor, counts: Sequence[int]) -> Callable[[], Tensor]:
        """See :class:`Transport`. Collective."""
        sent, received, sizes = self._gathered(rows, counts)
        request = self._moves.Iallgatherv(memory(as_bytes(sent)), [memory(as_bytes(received)), sizes])
        return partial(_finish, request, sent, received, rows.device)

    def _gathered(self, rows: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor, list[int]]:
        """What is sent, the room for all rows, and how many bytes every rank has of them."""
        sent, received = self._sent(rows), self._room(rows, (sum(counts), *rows.shape[1:]))
        settle(rows)
        return sent, received, [n * rows.shape[1:].numel() * rows.itemsize for n in counts]

    def reduce_scatter(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """See :class:`Transport`. Collective."""
        sent, received = self._sent(rows), self._room(rows, (counts[self._moves.rank], *rows.shape[1:]))
        settle(rows)
        self._moves.Reduce_scatter(memory(sent), memory(received), [n * rows.shape[1:].numel() for n in counts])
        return _on(rows.device, received)

    def allreduce(self, tensor: Tensor) -> Tensor:
        """See :class:`Transport`. Collective."""
        sent, received = self._sent(tensor), self._room(tensor, tensor.shape)
        settle(tensor)
        self._moves.Allreduce(memory(sent), memory(received))
        return _on(tensor.device, received)

    def start_sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        """See :class:`Transport`. Collective."""
        sent, received = self._sent(tensor), self._room(tensor, tensor.shape)
        settle(tensor)
        return partial(_finish, self._sums.Iallreduce(memory(sent), memory(received)), sent, received, tensor.device)

    def start_exchange(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> Callable[[], dict[int, Tensor]]:
        """See :class:`Transport`. Receives are posted first. Collective."""
        sent = {rank: self._sent(tensor) for rank, tensor in outgoing.items()}
        received = {rank: self._room(like, like.shape) for rank, like in incoming.items()}
        settle(*outgoing.values(), *incoming.values())
        requests = [self._moves.Irecv(memory(as_bytes(buffer)), source=rank) for rank, buffer in received.items()]
        requests += [self._moves.Isend(memory(as_bytes(message)), dest=rank) for rank, message in sent.items()]
        devices = {rank: like.device for rank, like in incoming.items()}
        return partial(_finish_exchange, requests, sent, received, devices)

    def close(self) -> None:
        """Nothing: the communicators belong to who made them."""

    def _sent(self, tensor: Tensor) -> Tensor:
        """The tensor in contiguous host memory, once it has settled."""
        if tensor.device.type == "cpu":
            return tensor.detach().contiguous()
        return self._room(tensor, tensor.shape).copy_(tensor.detach(), non_blocking=True)

    def _room(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        """Host memory for tensors of that type and device."""
        return torch.empty(tuple(shape), dtype=like.dtype, pin_memory=like.device.type == "cuda")


class CudaAwareTransport(HostTransport):
    """MPI from the tensors' own memory, which an MPI library that does not know GPUs ends the process for.

    Collectives do not overlap: Open MPI takes no memory of a GPU in non-blocking reductions, so they are made when they are
    waited for.
    """

    def start_allgather(self, rows: Tensor, counts: Sequence[int]) -> Callable[[], Tensor]:
        """See :class:`Transport`. Collective."""
        return partial(self._allgather, rows, counts)

    def _allgather(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        sent, received, sizes = self._gathered(rows, counts)
        self._moves.Allgatherv(memory(as_bytes(sent)), [memory(as_bytes(received)), sizes])
        return received

    def start_sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        """See :class:`Transport`. Collective."""
        return partial(self.allreduce, tensor)

    def _sent(self, tensor: Tensor) -> Tensor:
        return tensor.detach().contiguous()

    def _room(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        return like.new_empty(tuple(shape))


def through_host(moves: Any, sums: Any) -> Transport:
    """What carries tensors through host memory, where there is anybody to carry them to; arguments of :class:`HostTransport`."""
    return HostTransport(moves, sums) if moves.size > 1 else Alone()


def settle(*tensors: Tensor) -> None:
    """Wait until the GPUs of these tensors have done what was asked of them: MPI knows nothing of streams. It must neither read
    what is still being written, nor write into new memory that earlier work still uses."""
    for device in {tensor.device for tensor in tensors if tensor.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()


def copied(tensor: Tensor) -> Tensor:
    """A contiguous copy, without gradients."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, ``[bytes]``, over the same memory."""
    return tensor.reshape(-1).view(torch.uint8)


def memory(tensor: Tensor) -> Any:
    """What MPI takes for a contiguous tensor: an array over the same memory, or the tensor itself where it is a GPU's."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def _finish(request: Any, sent: Tensor, received: Tensor, device: torch.device) -> Tensor:
    """Wait for a request; both buffers live until then."""
    request.Wait()
    return _on(device, received)


def _finish_exchange(
    requests: Sequence[Any], sent: dict[int, Tensor], received: dict[int, Tensor], devices: Mapping[int, torch.device]
) -> dict[int, Tensor]:
    """Wait for all requests; what is sent and what is received lives until then."""
    for request in requests:
        request.Wait()
    return {rank: _on(devices[rank], buffer) for rank, buffer in received.items()}


def _on(device: torch.device, buffer: Tensor) -> Tensor:
    return buffer.to(device, non_blocking=True)  # torch keeps a pinned buffer until it is copied
