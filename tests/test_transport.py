"""Who takes which GPU, how that computes, and which transports are refused: whatever needs no second rank."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from ddpatch.errors import UserError
from ddpatch.parallel import comm as communicator
from ddpatch.parallel.comm import Communicator
from ddpatch.parallel.connection import takes_gpu_memory
from ddpatch.parallel.devices import choose_device

CPU = torch.device("cpu")


def numbers(seen: list[list[str]], share: bool = False) -> list[int]:
    return [choose_device("cuda", seen, local, share).index for local in range(len(seen))]


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ([["a", "b", "c"]] * 3, [0, 1, 2]),  # every rank sees the whole node
        ([["a"], ["b"], ["c"]], [0, 0, 0]),  # the batch system shows every rank its own
        ([["a", "b"], ["a", "b"], ["c", "d"], ["c", "d"]], [0, 1, 0, 1]),
        ([["a", "b"], ["b", "a"]], [0, 0]),
    ],
)
def test_every_rank_takes_a_gpu_of_its_own(seen: list[list[str]], expected: list[int]) -> None:
    assert numbers(seen) == expected


def test_ranks_share_a_gpu_only_when_asked_for() -> None:
    seen = [["a", "b"]] * 5
    assert numbers(seen, share=True) == [0, 1, 0, 1, 0]
    message = r"parallel\.device: 5 ranks on this node for 2 GPUs; .* parallel\.share_device to true"
    for local in range(5):
        with pytest.raises(UserError, match=message):
            choose_device("auto", seen, local)


def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused() -> None:
    seen: list[list[str]] = [[], []]
    assert choose_device("auto", seen, 1) == choose_device("cpu", [["a"], ["a"]], 1) == CPU
    for share in (False, True):
        with pytest.raises(UserError, match=r"parallel\.device: 2 ranks on this node for 0 GPUs"):
            choose_device("cuda", seen, 0, share)


@pytest.fixture
def arithmetic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What torch is told of GPUs, as it is by default, before and after; and one GPU that is not there."""
    monkeypatch.setattr(communicator, "visible_gpus", lambda: ["a"])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_gpu_rounds_no_factors_and_adds_in_one_order_where_runs_repeat(deterministic: bool) -> None:
    """What comes of it is in tests/mpi/test_gpu.py, where there are GPUs."""
    comm = Communicator(deterministic=deterministic)
    comm.place("cpu")
    assert torch.backends.cudnn.allow_tf32  # torch's default, which is not ours
    assert comm.place("cuda").type == "cuda"
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert torch.are_deterministic_algorithms_enabled() is deterministic
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is deterministic
    comm.free()


def test_cuda_aware_mpi_is_refused_without_a_gpu_and_changes_nothing() -> None:
    comm = Communicator()
    before = comm.transport
    with pytest.raises(UserError, match=r"parallel\.transport: cuda-aware: expected a GPU on every rank.*host works everywhere"):
        comm.connect("cuda-aware", CPU)
    assert comm.transport is before


def test_a_library_that_cannot_be_asked_takes_no_memory_of_a_gpu() -> None:
    assert not takes_gpu_memory("libm.so.6")


def test_a_communicator_connects_again_and_again() -> None:
    comm = Communicator()
    for transport in ("torch", "torch", "host", "torch"):
        comm.connect(transport, CPU)
        assert comm.allreduce_(torch.ones(2)).tolist() == [1.0, 1.0]
    comm.free()
