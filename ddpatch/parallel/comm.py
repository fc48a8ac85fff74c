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
from typing import Any, NamedTuple

import mpi4py
import numpy as np
import torch
from torch import Tensor

from ddpatch.errors import Left, UserError

mpi4py.rc.initialize = False  # the launcher is checked before MPI_Init, which would otherwise end the process with its own words
mpi4py.rc.finalize = True
from mpi4py import MPI  # noqa: E402

LAUNCHERS = {  # size variable: (launcher, what the MPI library calls itself; None: whichever is built against it)
    "OMPI_COMM_WORLD_SIZE": ("Open MPI's mpirun", "Open MPI"),
    "PMI_SIZE": ("mpiexec of MPICH", None),
    "SLURM_STEP_NUM_TASKS": ("srun", None),
}
RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
GRACE_SECONDS = 2.0
FORWARD_SECONDS = 0.5
LEFT = os.EX_TEMPFAIL


class PendingSum(NamedTuple):
    """A sum on its way: the tensor, the buffers that must live until it is there, and MPI's request; none in rank order."""

    tensor: Tensor
    sent: np.ndarray | None
    received: np.ndarray | None
    request: MPI.Request | None


class Communicator:
    """A clone of an MPI communicator that moves tensors, staged through host memory, and counts what it moves.

    Methods marked *Collective* must be called by all ranks in the same order.

    Arguments:
        comm: The communicator to clone. Default: all ranks of the job.
        deterministic: Sum in rank order instead of the order that MPI finds fastest, so that a repeated run is bit-equal.

    Attributes:
        rank, size: This rank and the number of ranks.
        calls, bytes: Number of calls and of bytes sent by this rank, by kind of communication.
        seconds: Wall time this rank spent in communication, waiting included.
        seconds_by_kind: The same, by kind of communication.
    """

    def __init__(self, comm: MPI.Intracomm | None = None, deterministic: bool = False) -> None:
        start_mpi()
        self._comm = (MPI.COMM_WORLD if comm is None else comm).Dup()
        self._control, self._sums = self._comm.Dup(), self._comm.Dup()
        self.rank, self.size = self._comm.rank, self._comm.size
        self.deterministic = deterministic
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.seconds = 0.0
        self.seconds_by_kind: defaultdict[str, float] = defaultdict(float)

    def split(self, color: int) -> Communicator:
        """The communicator of the ranks that pass the same color. Collective."""
        return Communicator(MPI.Intracomm(self._comm.Split(color, self.rank)), self.deterministic)

    def free(self) -> None:
        """Release the MPI handles. Collective."""
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
        send = _host(rows)
        width = int(np.prod(send.shape[1:]))
        receive = np.empty((sum(counts), *send.shape[1:]), send.dtype)
        with self._counted("allgather", send.nbytes):
            self._comm.Allgatherv(_bytes(send), [_bytes(receive), [n * width * send.itemsize for n in counts], MPI.BYTE])
        return _like(receive, rows)

    def reduce_scatter(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Sum the rows of all ranks and keep this rank's: the adjoint of :meth:`allgather`. Collective.

        Arguments:
            rows: Rows for all ranks, with shape ``[sum(counts), ...]``.
            counts: Number of rows of every rank.
        """
        if self.deterministic:
            pieces = self.alltoall(list(rows.split(list(counts))), [(counts[self.rank], *rows.shape[1:])] * self.size)
            return _ordered_sum(pieces)
        send = _host(rows)
        receive = np.empty((counts[self.rank], *send.shape[1:]), send.dtype)
        width = int(np.prod(send.shape[1:]))
        with self._counted("reduce_scatter", send.nbytes):
            self._comm.Reduce_scatter(send, receive, [n * width for n in counts], MPI.SUM)
        return _like(receive, rows)

    def allreduce_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place. Collective."""
        if self.deterministic:
            parts = self.allgather(tensor[None], [1] * self.size)
            return tensor.copy_(_ordered_sum(list(parts)))
        send = _host(tensor)
        receive = np.empty_like(send)
        with self._counted("allreduce", send.nbytes):
            self._comm.Allreduce(send, receive, MPI.SUM)
        return tensor.copy_(torch.from_numpy(receive))

    def start_sum(self, tensor: Tensor) -> PendingSum:
        """Begin to sum a tensor over all ranks, while other communication goes on. Collective; finish in the same order."""
        if self.deterministic:
            return PendingSum(tensor, None, None, None)
        send = _host(tensor)
        receive = np.empty_like(send)
        with self._counted("allreduce", send.nbytes):
            return PendingSum(tensor, send, receive, self._sums.Iallreduce(send, receive, MPI.SUM))

    def finish_sum(self, pending: PendingSum) -> Tensor:
        """The sum that :meth:`start_sum` began, when it is there. Collective."""
        if pending.request is None or pending.received is None:
            return self.allreduce_(pending.tensor.clone())
        start = time.perf_counter()
        pending.request.Wait()
        self._waited("allreduce", start)
        return _like(pending.received, pending.tensor)

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
        """Neighbour exchange: one non-blocking message per rank and direction; receives are posted first.

        Arguments:
            outgoing: Tensor to send, by receiving rank. A message to this rank itself is returned as it is.
            incoming: Tensor whose shape and type the message has, by sending rank.
            kind: Name under which the call is counted.
        """
        buffers = {rank: np.empty_like(_host(like)) for rank, like in incoming.items() if rank != self.rank}
        messages = {rank: _host(tensor) for rank, tensor in outgoing.items() if rank != self.rank}
        with self._counted(kind, sum(m.nbytes for m in messages.values())):
            requests = [self._comm.Irecv(_bytes(b), source=rank) for rank, b in buffers.items()]
            requests += [self._comm.Isend(_bytes(m), dest=rank) for rank, m in messages.items()]
            MPI.Request.Waitall(requests)
        received = {rank: _like(b, incoming[rank]) for rank, b in buffers.items()}
        return received | {rank: tensor for rank, tensor in outgoing.items() if rank == self.rank}

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Iterator[Tensor]:
        """On rank 0, iterate over the rows of all ranks in order, one in memory at a time; nothing elsewhere. Collective."""
        with self._counted("gather", rows.nbytes if self.rank else 0):
            if self.rank:
                for row in rows:
                    self._comm.Send(_bytes(_host(row)), dest=0)
                return
        yield from rows
        for source in range(1, self.size):
            for _ in range(counts[source]):
                buffer = np.empty_like(_host(rows[0]))
                self._comm.Recv(_bytes(buffer), source=source)
                yield _like(buffer, rows)

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

    def place(self, device: str = "auto") -> torch.device:
        """Choose this rank's device and number of threads by its place on the node. Collective.

        Arguments:
            device: ``cpu``, ``cuda``, or ``auto`` (``cuda`` where there is one). Every rank needs a GPU of its own.

        Raises:
            UserError: if a node has more ranks than GPUs.
        """
        node = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        local, here = node.rank, node.size
        cores = set().union(*node.allgather(os.sched_getaffinity(0)))
        node.Free()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(cores) // here))
        if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
            return torch.device("cpu")
        if torch.cuda.device_count() < here:
            raise UserError(
                f"parallel.device: {here} ranks on this node for {torch.cuda.device_count()} GPUs; "
                "start one rank per GPU, or set parallel.device to cpu"
            )
        torch.cuda.set_device(local)
        return torch.device("cuda", local)

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

    @contextmanager
    def _counted(self, kind: str, sent: int) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._waited(kind, start)
        self.calls[kind] += 1
        self.bytes[kind] += sent

    def _waited(self, kind: str, start: float) -> None:
        seconds = time.perf_counter() - start
        self.seconds += seconds
        self.seconds_by_kind[kind] += seconds


def guard(verb: Callable[[Communicator], None]) -> int:
    """Run a verb on all ranks under the rules of failure; returns the exit code. Collective.

    A :class:`UserError` becomes one line and code 2, a :class:`Left`, which all ranks raise together, one line and code 75. Any
    other exception ends the job with this rank's traceback.
    """
    try:
        comm = Communicator()
    except UserError as mistake:
        if all(os.environ.get(variable, "0") == "0" for variable in RANKS):
            print(f"ddpatch: error: {mistake}", file=sys.stderr, flush=True)
        return 2
    try:
        verb(comm)
    except UserError as mistake:
        return comm.refuse(mistake)
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
        for variable, (launcher, family) in LAUNCHERS.items():
            if family and _asked(variable) > 1 and family not in library:
                raise UserError(_foreign(launcher, _asked(variable), library))
        MPI.Init_thread()
    if MPI.COMM_WORLD.size > 1:
        sys.excepthook = end_job
    for variable, (launcher, _) in LAUNCHERS.items():
        if _asked(variable) > 1 and MPI.COMM_WORLD.size == 1:
            raise UserError(_foreign(launcher, _asked(variable), library))


def end_job(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The excepthook of a job of several ranks: print this rank's traceback and end all of them."""
    everyone, text = MPI.COMM_WORLD, "".join(traceback.format_exception(kind, error, trace))
    abort(f"rank {everyone.rank} of {everyone.size} failed:\n{text}", 1)


def abort(text: str, code: int) -> None:
    """End all ranks of the job with a text from this one."""
    print(text, file=sys.stderr, flush=True)
    time.sleep(FORWARD_SECONDS)  # output and abort reach the launcher on two ways, and it reads no more after the abort
    MPI.COMM_WORLD.Abort(code)


def _asked(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdigit() else 1


def _foreign(launcher: str, asked: int, library: str) -> str:
    return (
        f"{launcher} started {asked} processes, but mpi4py uses {library} and each would run alone; "
        "use the mpiexec or srun that belongs to it"
    )


def mpi_library() -> str:
    """Name and version of the MPI library, in a line."""
    return MPI.Get_library_version().splitlines()[0].replace("\t", " ").strip("\x00 ")


def _host(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().cpu().numpy()


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _like(array: np.ndarray, tensor: Tensor) -> Tensor:
    return torch.from_numpy(array).to(tensor.device)


def _ordered_sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
