from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import CASES, TRANSPORTS, connect, random_field
from torch import Tensor

from ddpatch.decomposition import Decomposition
from ddpatch.errors import UserError
from ddpatch.model.patches import cut
from ddpatch.parallel.collectives import Exchange
from ddpatch.parallel.comm import Communicator
from ddpatch.parallel.gradients import GradientSum
from ddpatch.parallel.halo import Halo
from ddpatch.parallel.roll import roll

pytestmark = pytest.mark.mpi(min_size=1)


def padded(field: Tensor, width: int, periodic: tuple[bool, ...]) -> Tensor:
    """The whole field with its halo: wrapped on periodic axes, zero beyond walls."""
    for axis, wraps in enumerate(reversed(periodic)):
        pad = [0] * (2 * len(periodic))
        pad[2 * axis : 2 * axis + 2] = [width, width]
        field = F.pad(field, pad, mode="circular") if wraps else F.pad(field, pad)
    return field


@pytest.fixture(params=TRANSPORTS)
def transport(comm: Communicator, request: pytest.FixtureRequest) -> None:
    """Connects the communicator with each of the transports."""
    connect(comm, request.param)


over_every_transport = pytest.mark.usefixtures("transport")


def inner(a: Tensor, b: Tensor, comm: Communicator) -> float:
    return float(comm.allreduce_((a * b).sum()[None]))


@pytest.mark.parametrize("width", [0, 1, 2])
@pytest.mark.parametrize(("grid", "patch", "periodic"), CASES)
def test_windows_are_boxes_of_the_padded_field(
    comm: Communicator, grid: tuple[int, ...], patch: tuple[int, ...], periodic: tuple[bool, ...], width: int
) -> None:
    decomposition = Decomposition(grid, patch, comm.size, periodic)
    exchange = Exchange(decomposition, comm, width)
    field = random_field(2, 3, grid)
    windows = exchange.halo(cut(field, decomposition, exchange.patches))
    whole = padded(field, width, periodic)
    for i, number in enumerate(exchange.patches):
        place = zip(decomposition.start(number), patch, strict=True)
        box: Any = (..., *(slice(s, s + n + 2 * width) for s, n in place))
        assert torch.equal(windows[:, i], whole[box])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("grid", "patch", "periodic"), CASES)
def test_patches_of_a_rolled_field(
    comm: Communicator, grid: tuple[int, ...], patch: tuple[int, ...], periodic: tuple[bool, ...], sign: int
) -> None:
    decomposition = Decomposition(grid, patch, comm.size, periodic)
    own, field = decomposition.local_patches(comm.rank), random_field(2, 3, grid)
    shifts = [sign * (n - 1 - axis) if wraps else 0 for axis, (n, wraps) in enumerate(zip(patch, periodic, strict=True))]
    rolled = field.roll([-s for s in shifts], tuple(range(2, field.ndim)))
    assert torch.equal(roll(cut(field, decomposition, own), shifts, decomposition, comm), cut(rolled, decomposition, own))


def test_a_roll_by_a_patch_or_through_a_wall_is_refused(comm: Communicator) -> None:
    decomposition = Decomposition((8, 8), (4, 4), 1, (True, False))
    for shifts in ([4, 0], [0, 1]):
        with pytest.raises(ValueError, match="shift"):
            roll(torch.zeros(1, 4, 1, 4, 4), shifts, decomposition, comm.split(comm.rank))


@over_every_transport
@pytest.mark.parametrize(("grid", "patch", "periodic"), CASES)
def test_the_halo_exchange_and_its_backward_are_adjoint(
    comm: Communicator, grid: tuple[int, ...], patch: tuple[int, ...], periodic: tuple[bool, ...]
) -> None:
    decomposition = Decomposition(grid, patch, comm.size, periodic)
    exchange = Exchange(decomposition, comm, 2)
    x = cut(random_field(2, 3, grid), decomposition, exchange.patches).requires_grad_()
    windows = exchange.halo(x)
    y = torch.randn(windows.shape, generator=torch.Generator().manual_seed(comm.rank), dtype=torch.float64)
    windows.backward(y)
    assert x.grad is not None
    assert inner(windows.detach(), y, comm) == pytest.approx(inner(x.detach(), x.grad, comm), rel=1e-13)


@over_every_transport
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_gather_and_its_backward_are_adjoint(comm: Communicator, deterministic: bool) -> None:
    comm.deterministic = deterministic
    decomposition = Decomposition((10, 6), (2, 3), comm.size)
    exchange = Exchange(decomposition, comm, 0)
    x = cut(random_field(2, 5, (10, 6)), decomposition, exchange.patches).requires_grad_()
    tokens = exchange.gather(x)
    assert torch.equal(tokens, cut(random_field(2, 5, (10, 6)), decomposition))
    y = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(comm.rank), dtype=torch.float64)
    tokens.backward(y)
    assert x.grad is not None
    assert inner(tokens.detach(), y, comm) == pytest.approx(inner(x.detach(), x.grad, comm), rel=1e-13)


@over_every_transport
@pytest.mark.parametrize("deterministic", [False, True])
def test_reductions_sum_over_ranks(comm: Communicator, deterministic: bool) -> None:
    comm.deterministic = deterministic
    counts = [rank + 1 for rank in range(comm.size)]
    rows = torch.arange(sum(counts) * 2.0).view(-1, 2) * (comm.rank + 1)
    total = torch.arange(sum(counts) * 2.0).view(-1, 2) * sum(counts)
    assert torch.equal(comm.reduce_scatter(rows, counts), total.split(counts)[comm.rank])
    assert torch.equal(comm.allreduce_(rows.clone()), total)


@over_every_transport
def test_alltoall_transposes_ranks_and_pieces(comm: Communicator) -> None:
    pieces = [torch.full((comm.rank + 1, to + 1), 10.0 * comm.rank + to) for to in range(comm.size)]
    received = comm.alltoall(pieces, [(source + 1, comm.rank + 1) for source in range(comm.size)])
    for source, piece in enumerate(received):
        assert torch.equal(piece, torch.full((source + 1, comm.rank + 1), 10.0 * source + comm.rank))


@over_every_transport
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.bool])
def test_messages_of_any_type_and_size_go_to_some_ranks(comm: Communicator, dtype: torch.dtype) -> None:
    """Rank r sends r + 1 numbers to the ranks up to itself; what it sends to itself comes back as it is."""
    rank, ranks = comm.rank, range(comm.size)
    outgoing = {to: torch.full((rank + 1, 3), rank + 1, dtype=dtype).t() for to in ranks if to <= rank}
    incoming = {source: torch.empty(3, source + 1, dtype=dtype) for source in ranks if source >= rank}
    received = comm.exchange(outgoing, incoming)
    assert received[rank] is outgoing[rank]
    assert set(received) == set(incoming)
    for source, message in received.items():
        assert torch.equal(message, torch.full((3, source + 1), source + 1, dtype=dtype))


@over_every_transport
def test_an_exchange_without_messages_and_rows_without_numbers(comm: Communicator) -> None:
    assert comm.exchange({}, {}) == {}
    counts = [int(rank == 0) for rank in range(comm.size)]
    assert comm.allgather(torch.ones(counts[comm.rank], 2), counts).tolist() == [[1.0, 1.0]]
    assert comm.allgather(torch.ones(1, 0), [1] * comm.size).shape == (comm.size, 0)


@over_every_transport
def test_a_part_of_the_ranks_has_the_same_transport(comm: Communicator) -> None:
    part = comm.split(comm.rank % 2)
    total = part.allreduce_(torch.tensor([1.0 + comm.rank], dtype=torch.float64))
    assert float(total) == sum(rank + 1 for rank in range(comm.size) if rank % 2 == comm.rank % 2)
    part.free()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_a_transport_that_is_closed_leaves_no_thread(comm: Communicator) -> None:
    """A thread of gloo that outlives its group turns in circles when the other end is gone."""

    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    kept, counts = [], []
    for _ in range(4):
        part = comm.split(0)
        connect(part, "torch").allreduce_(torch.ones(1))
        part.free()
        kept.append(part)  # as a cycle of references would
        comm.barrier()
        counts.append(threads())
    assert counts[-1] == counts[0]


@over_every_transport
def test_sums_overlap_with_other_communication(comm: Communicator) -> None:
    numbers = [torch.full((1000,), float(comm.rank + n)) for n in range(3)]
    pending = [comm.start_sum(tensor) for tensor in numbers]
    comm.allgather(torch.ones(1), [1] * comm.size)
    for n, sum_on_its_way in enumerate(pending):
        total = sum(rank + n for rank in range(comm.size))
        assert comm.finish_sum(sum_on_its_way).tolist() == [total] * 1000
        assert numbers[n].tolist() == [comm.rank + n] * 1000


def test_rows_arrive_at_rank_0_in_order(comm: Communicator) -> None:
    counts = [rank % 2 + 1 for rank in range(comm.size)]
    rows = [int(row) for row in comm.gather_rows(torch.full((counts[comm.rank], 1), comm.rank), counts)]
    expected = [rank for rank in range(comm.size) for _ in range(counts[rank])]
    assert rows == (expected if comm.rank == 0 else [])


@over_every_transport
def test_gradients_are_summed_and_missing_ones_count_as_zero(comm: Communicator) -> None:
    used, unused = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    (used.sum() * (comm.rank + 1)).backward()
    if comm.rank == 0:
        unused.sum().backward()
    GradientSum([used, unused], comm).finish()
    assert used.grad is not None and unused.grad is not None
    assert used.grad.tolist() == [sum(range(1, comm.size + 1))] * 3
    assert unused.grad.tolist() == [1.0] * 3


def test_a_sum_that_was_released_leaves_the_parameters_to_another(comm: Communicator) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    GradientSum([parameter], comm).release()
    gradients = GradientSum([parameter], comm)
    parameter.sum().backward()
    gradients.finish()
    assert parameter.grad is not None and parameter.grad.tolist() == [comm.size] * 3
    assert comm.calls["allreduce"] == 1


@over_every_transport
def test_bytes_and_calls_are_counted(comm: Communicator) -> None:
    """A rank sends its halo once and its tokens once; bytes follow from the surface and from the tokens alone."""
    decomposition = Decomposition((8, 8 * comm.size), (8, 8), comm.size, (False, True))
    exchange = Exchange(decomposition, comm, 2)
    exchange.halo(torch.zeros(3, 1, 5, 8, 8))
    exchange.gather(torch.zeros(3, 1, 16, 7))
    neighbours = 2 if comm.size > 1 else 0
    assert comm.calls == {"halo": 1, "allgather": 1}
    assert comm.bytes == {"halo": neighbours * 3 * 5 * 2 * 8 * 4, "allgather": 3 * 16 * 7 * 4}
    assert set(comm.seconds_by_kind) == {"halo", "allgather"}
    assert sum(comm.seconds_by_kind.values()) == pytest.approx(comm.seconds)


def test_a_halo_wider_than_the_patch_is_refused(comm: Communicator) -> None:
    with pytest.raises(UserError, match=r"model\.halo: 5 points are wider"):
        Halo(Decomposition((8, 8), (4, 4), 1), 0, 5)


def test_a_failure_of_rank_0_reaches_all_ranks(comm: Communicator) -> None:
    def fail() -> None:
        raise UserError("disk: full")

    with pytest.raises(UserError, match="disk: full"):
        comm.on_root(fail)
