"""The choice of a transport, and the check at launch that it can do here what is asked of it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ddpatch.errors import UserError
from ddpatch.parallel.torch_transport import TorchTransport
from ddpatch.parallel.transport import CudaAwareTransport, Transport, through_host

CHECKED_NUMBERS = 1000


def connect(name: str, device: torch.device, moves: Any, sums: Any, library: str) -> Transport:
    """The transport of that name, after it summed a small buffer on the device correctly. Collective.

    Arguments:
        name: ``host``, ``cuda-aware`` or ``torch``.
        device: This rank's.
        moves: MPI communicator of the ranks.
        sums: MPI communicator of the same ranks, for sums that overlap with other communication.
        library: File through which the symbols of the MPI library are found.

    Raises:
        UserError: on all ranks, if the transport does not work on one of them.
    """
    if name == "host":
        return through_host(moves, sums)
    gpus = moves.allgather(_identity(device))
    _agree(name, _gpu_obstacle(gpus[moves.rank], library) if name == "cuda-aware" else _group_obstacle(gpus), moves)
    transport = CudaAwareTransport(moves, sums) if name == "cuda-aware" else TorchTransport(moves, device)
    _agree(name, "" if _sums_right(transport, device, moves.rank, moves.size) else "it sums wrongly over these ranks", moves)
    return transport


def takes_gpu_memory(library: str) -> bool:
    """Whether the MPI library says that it reads and writes the memory of GPUs; one that cannot be asked does not say so.

    Arguments:
        library: File through which its symbols are found.
    """
    symbols = ctypes.CDLL(library)
    if hasattr(symbols, "MPIX_Query_cuda_support"):  # Open MPI, MPICH, MVAPICH
        return bool(symbols.MPIX_Query_cuda_support())
    says = ctypes.c_int(0)
    if hasattr(symbols, "MPIX_GPU_query_support"):  # libraries made from MPICH; its number for CUDA is 0
        symbols.MPIX_GPU_query_support(0, ctypes.byref(says))
    return bool(says.value)


def _gpu_obstacle(gpu: str, library: str) -> str:
    if not gpu:
        return "expected a GPU on every rank, got parallel.device cpu"
    if not takes_gpu_memory(library):
        return "the MPI library does not say that it takes the memory of a GPU (MPIX_Query_cuda_support)"
    return ""


def _group_obstacle(gpus: Sequence[str]) -> str:
    """What keeps these GPUs, empty where a rank has none, from forming a group of torch.distributed."""
    if not any(gpus):
        return "" if dist.is_available() and dist.is_gloo_available() else "this torch was built without gloo"
    if not all(gpus):
        return f"expected a GPU on every rank or on none, got {sum(map(bool, gpus))} of {len(gpus)}"
    if len(set(gpus)) < len(gpus):
        return f"NCCL needs a GPU for every rank, got {len(set(gpus))} for {len(gpus)}"
    return "" if dist.is_available() and dist.is_nccl_available() else "this torch was built without NCCL"


def _agree(name: str, obstacle: str, mpi: Any) -> None:
    obstacles = [found for found in mpi.allgather(obstacle) if found]
    if obstacles:
        raise UserError(f"parallel.transport: {name}: {obstacles[0]}; choose another one, host works everywhere")


def _sums_right(transport: Transport, device: torch.device, rank: int, size: int) -> bool:
    numbers = torch.arange(CHECKED_NUMBERS, dtype=torch.float64, device=device)
    finish = transport.start_sum(numbers * (rank + 1))
    found = transport.allreduce(numbers * (rank + 1)), finish()
    return all(torch.equal(total, numbers * (size * (size + 1) // 2)) for total in found)


def _identity(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
