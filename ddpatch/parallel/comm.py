"""The one module that imports mpi4py: a communicator of tensors, launch checks, and what happens when a rank fails.

Everything above receives a :class:`Communicator`. One rank is not a special case: every method works with size 1.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import mpi4py
import numpy as np
import torch
from torch import Tensor

from ddpatch.errors import Left, UserError
from ddpatch.parallel.connection import connect
from ddpatch.parallel.devices import choose_device, set_arithmetic, too_large, visible_gpus
from ddpatch.parallel.launcher import check_library, check_size, is_first, sleep_if_crowded
from ddpatch.parallel.transport import Transport, as_bytes, memory, through_host

mpi4py.rc.initialize = False  # the launcher is checked before MPI_Init, which would otherwise end the process with its own words
mpi4py.rc.finalize = True
from mpi4py import MPI  # noqa: E402

GRACE_SECONDS = 2.0
FORWARD_SECONDS = 0.5
LEFT = os.EX_TEMPFAIL
Result = TypeVar("Result")


class PendingSum(NamedTuple):
    """A sum on its way: the tensor, and what waits for its sum; nothing in rank order, where the sum begins at its end."""

    tensor: Tensor
    wait: Callable[[], Tensor] | None


class Communicator:
    """A clone of an MPI communicator that moves tensors and counts what it moves.

    A transport carries the tensors (:mod:`ddpatch.parallel.transport`), at first through host memory; everything else travels by
    MPI. Methods marked *Collective* must be called by all ranks in the same order.

    Arguments:
        comm: The communicator to clone. Default: all ranks of the job.
        deterministic: Sum in rank order instead of the order that MPI finds fastest, so that a repeated run is bit-equal.

    Attributes:
        rank, size: This rank and the number of ranks.
        connected: Name of the transport.
        transport: What carries tensors of :attr:`device`; those elsewhere go through host memory.
        device: This rank's, once it is connected.
        calls, bytes: Number of calls and of bytes sent by this rank, by kind of communication.
        seconds: Wall time this rank spent in communication, waiting included; with NCCL, which a GPU waits for, in asking for it.
        seconds_by_kind: The same, by kind of communication.
    """

    def __init__(self, comm: MPI.Intracomm | None = None, deterministic: bool = False) -> None:
        start_mpi()
        self._comm = (MPI.COMM_WORLD if comm is None else comm).Dup()
        self._control, self._sums = self._comm.Dup(), self._comm.Dup()
        self.rank, self.size = self._comm.rank, self._comm.size
        self.deterministic = deterministic
        self.device, self.connected = torch.device("cpu"), "host"
        self._host = through_host(self._comm, self._sums)
        self.transport: Transport = self._host
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.seconds = 0.0
        self.seconds_by_kind: defaultdict[str, float] = defaultdict(float)

    def split(self, color: int) -> Communicator:
        """The communicator of the ranks that pass the same color, with the same transport. Collective."""
        part = Communicator(MPI.Intracomm(self._comm.Split(color, self.rank)), self.deterministic)
        part.connect(self.connected, self.device)
        return part

    def connect(self, transport: str, device: torch.device) -> None:
        """Choose what carries the tensors of this rank's device from now on. Collective.

        Arguments:
            transport: ``host``, ``cuda-aware`` or ``torch``.
            device: This rank's.

        Raises:
            UserError: on all ranks, if the transport does not work on one of them.
        """
        if (transport, device) != (self.connected, self.device):
            chosen = connect(transport, device, self._comm, self._sums, MPI.__file__)
            self.transport.close()
            self.transport, self.connected, self.device = chosen, transport, device

    def free(self) -> None:
        """Release the transport and the MPI handles. Collective."""
        self.transport.close()
        self._control.Free()
        self._sums.Free()
        self._comm.Free()

    @property
    def raw(self) -> MPI.Intracomm:
        """The MPI communicator itself, for libraries that take one (parallel HDF5)."""
        return self._comm

    def allgather(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Concatenate the rows of all ranks along dim 0, in rank order. Collective.

        Arguments:
            rows: This rank's rows, with shape ``[counts[rank], ...]``.
            counts: Number of rows of every rank.
        """
        return self.start_allgather(rows, counts)()

    def start_allgather(self, rows: Tensor, counts: Sequence[int]) -> Callable[[], Tensor]:
        """Begin an :meth:`allgather`, while other communication goes on; what is returned waits for it. Collective."""
        with self._counted("allgather", rows.nbytes):
            return self._pending("allgather", self._carrier(rows).start_allgather(rows, counts))

    def reduce_scatter(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Sum the rows of all ranks and keep this rank's: the adjoint of :meth:`allgather`. Collective.

        Arguments:
            rows: Rows for all ranks, with shape ``[sum(counts), ...]``.
            counts: Number of rows of every rank.
        """
        if self.deterministic:
            pieces = self.alltoall(list(rows.split(list(counts))), [(counts[self.rank], *rows.shape[1:])] * self.size)
            return _ordered_sum(pieces)
        with self._counted("reduce_scatter", rows.nbytes):
            return self._carrier(rows).reduce_scatter(rows, counts)

    def allreduce_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place. Collective."""
        if self.deterministic:
            parts = self.allgather(tensor[None], [1] * self.size)
            return tensor.copy_(_ordered_sum(list(parts)))
        with self._counted("allreduce", tensor.nbytes):
            return tensor.copy_(self._carrier(tensor).allreduce(tensor))

    def start_sum(self, tensor: Tensor) -> PendingSum:
        """Begin to sum a tensor over all ranks, while other communication goes on. Collective; finish in the same order."""
        if self.deterministic:
            return PendingSum(tensor, None)
        with self._counted("allreduce", tensor.nbytes):
            return PendingSum(tensor, self._carrier(tensor).start_sum(tensor))

    def finish_sum(self, pending: PendingSum) -> Tensor:
        """The sum that :meth:`start_sum` began, when it is there. Collective."""
        if pending.wait is None:
            return self.allreduce_(pending.tensor.clone())
        start = time.perf_counter()
        total = pending.wait()
        self._waited("allreduce", start)
        return total

    def union(self, flags: int) -> int:
        """The bitwise or of all ranks' flags: one reduction of 8 bytes. Collective."""
        send, receive = np.array([flags], np.int64), np.empty(1, np.int64)
        with self._counted("union", send.nbytes):
            self._comm.Allreduce(send, receive, MPI.BOR)
        return int(receive[0])

    def alltoall(self, pieces: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Send ``pieces[r]`` to rank r; return what every rank sent here, with the given shapes. Collective."""
        incoming = {rank: pieces[0].new_empty(tuple(shape)) for rank, shape in enumerate(shapes)}
        received = self.exchange(dict(enumerate(pieces)), incoming, kind="alltoall")
        return [received[rank] for rank in range(self.size)]

    def exchange(
        self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor], kind: str = "exchange"
    ) -> dict[int, Tensor]:
        """Neighbour exchange: one message per rank and direction. Collective.

        Arguments:
            outgoing: Tensor to send, by receiving rank. A message to this rank itself is returned as it is.
            incoming: Tensor whose shape and type the message has, by sending rank.
            kind: Name under which the call is counted.
        """
        return self.start_exchange(outgoing, incoming, kind)()

    def start_exchange(
        self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor], kind: str = "exchange"
    ) -> Callable[[], dict[int, Tensor]]:
        """Begin an :meth:`exchange`, while other communication goes on; what is returned waits for it. Collective."""
        messages = {rank: tensor for rank, tensor in outgoing.items() if rank != self.rank}
        expected = {rank: like for rank, like in incoming.items() if rank != self.rank}
        own = {rank: tensor for rank, tensor in outgoing.items() if rank == self.rank}
        with self._counted(kind, sum(message.nbytes for message in messages.values())):
            wait = self._pending(kind, self._carrier(*outgoing.values(), *incoming.values()).start_exchange(messages, expected))
        return lambda: wait() | own

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Iterator[Tensor]:
        """On rank 0, iterate over the rows of all ranks in order, one in memory at a time; nothing elsewhere. Collective."""
        with self._counted("gather", rows.nbytes if self.rank else 0):
            if self.rank:
                for row in rows:
                    self._comm.Send(_host_bytes(row), dest=0)
                return
        yield from rows
        for source in range(1, self.size):
            for _ in range(counts[source]):
                buffer = torch.empty(rows.shape[1:], dtype=rows.dtype)
                self._comm.Recv(_host_bytes(buffer), source=source)
                yield buffer.to(rows.device)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on all ranks. Collective."""
        return self._comm.bcast(value)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order, on all ranks. Collective."""
        return self._comm.allgather(value)

    def barrier(self) -> None:
        """Wait for all ranks. Collective."""
        self._comm.Barrier()

    def on_root(self, action: Callable[[], Any]) -> Any:
        """Run ``action`` on rank 0 and return its value on all ranks; its failure is raised on all ranks. Collective."""
        outcome: tuple[Any, BaseException | None] = (None, None)
        if self.rank == 0:
            try:
                outcome = (action(), None)
            except (UserError, OSError) as failure:
                outcome = (None, failure)
        value, failed = self.broadcast(outcome)
        if failed is not None:
            raise failed
        return value

    def place(self, device: str = "auto", share: bool = False) -> torch.device:
        """Choose this rank's device and number of threads by its place on the node, and how a GPU computes. Collective.

        Arguments:
            device: ``cpu``, ``cuda``, or ``auto`` (``cuda`` where there is one).
            share: Whether ranks may share a GPU; otherwise every rank needs one of its own.

        Raises:
            UserError: if a node has more ranks than GPUs, and they may not share them.
        """
        node = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        local, here = node.rank, node.size
        cores = set().union(*node.allgather(os.sched_getaffinity(0)))
        seen = node.allgather([] if device == "cpu" else visible_gpus())
        node.Free()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(cores) // here))
        chosen = choose_device(device, seen, local, share)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
            set_arithmetic(self.deterministic)
        return chosen

    def refuse(self, mistake: UserError) -> int:
        """Report a user's mistake and return exit code 2. If other ranks go on regardless, the job is aborted.

        Where all ranks found a mistake, the first rank prints its line and all leave in order. Otherwise the ranks that did
        not find it may be waiting in a collective: this rank prints its line and ends the job.
        """
        line = f"ddpatch: error: {mistake}"
        found = np.zeros(self.size, np.uint8)
        request = self._control.Iallgather(np.ones(1, np.uint8), found)
        deadline = time.monotonic() + GRACE_SECONDS
        while not request.Test():
            if time.monotonic() > deadline:
                abort(f"{line} (rank {self.rank})", 2)
            time.sleep(0.01)
        if self.rank == 0:
            print(line, file=sys.stderr, flush=True)
        return 2

    def _carrier(self, *tensors: Tensor) -> Transport:
        """The transport for these tensors; without any, the one that ranks with some use too, which have them on the device."""
        return self.transport if all(tensor.device.type == self.device.type for tensor in tensors) else self._host

    @contextmanager
    def _counted(self, kind: str, sent: int) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._waited(kind, start)
        self.calls[kind] += 1
        self.bytes[kind] += sent

    def _pending(self, kind: str, wait: Callable[[], Result]) -> Callable[[], Result]:
        """The same wait, whose time counts."""

        def finish() -> Result:
            start = time.perf_counter()
            result = wait()
            self._waited(kind, start)
            return result

        return finish

    def _waited(self, kind: str, start: float) -> None:
        seconds = time.perf_counter() - start
        self.seconds += seconds
        self.seconds_by_kind[kind] += seconds


def guard(verb: Callable[[Communicator], None]) -> int:
    """Run a verb on all ranks under the rules of failure; returns the exit code. Collective.

    A :class:`UserError`, or that a GPU is full, becomes one line and code 2, a :class:`Left`, which all ranks raise together, one
    line and code 75. Any other exception ends the job with this rank's traceback.
    """
    try:
        comm = Communicator()
    except UserError as mistake:
        if is_first():
            print(f"ddpatch: error: {mistake}", file=sys.stderr, flush=True)
        return 2
    try:
        verb(comm)
    except UserError as mistake:
        return comm.refuse(mistake)
    except torch.cuda.OutOfMemoryError as full:
        return comm.refuse(too_large(full))
    except Left as left:
        if comm.rank == 0:
            print(f"ddpatch: {left}", file=sys.stderr, flush=True)
        return LEFT
    return 0


def start_mpi() -> None:
    """Initialise MPI once, after checking that the launcher and the MPI library belong together.

    Raises:
        UserError: if the launcher started several processes that do not see each other.
    """
    library = mpi_library()
    if not MPI.Is_initialized():  # a parallel h5py may have done it
        check_library(library)
        sleep_if_crowded()
        MPI.Init_thread()
    if MPI.COMM_WORLD.size > 1:
        sys.excepthook = end_job
    check_size(MPI.COMM_WORLD.size, library)


def end_job(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The excepthook of a job of several ranks: print this rank's traceback and end all of them."""
    everyone, text = MPI.COMM_WORLD, "".join(traceback.format_exception(kind, error, trace))
    abort(f"rank {everyone.rank} of {everyone.size} failed:\n{text}", 1)


def abort(text: str, code: int) -> None:
    """End all ranks of the job with a text from this one."""
    print(text, file=sys.stderr, flush=True)
    time.sleep(FORWARD_SECONDS)  # output and abort reach the launcher on two ways, and it reads no more after the abort
    MPI.COMM_WORLD.Abort(code)


def mpi_library() -> str:
    """Name and version of the MPI library, in a line."""
    return MPI.Get_library_version().splitlines()[0].replace("\t", " ").strip("\x00 ")


def _host_bytes(tensor: Tensor) -> Any:
    return memory(as_bytes(tensor.detach().contiguous().cpu()))


def _ordered_sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
