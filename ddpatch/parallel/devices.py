"""The GPUs of a node: which rank takes which, how they compute, and what a user may do about one that is full."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

import torch

from ddpatch.errors import UserError


def visible_gpus() -> list[str]:
    """Identities of the GPUs that this rank sees, in the order of their numbers here.

    A batch system may show every rank all GPUs of the node, or to each its own, which is number 0 for all of them.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [str(torch.cuda.get_device_properties(i).uuid) for i in range(count)]


def choose_device(wanted: str, seen: Sequence[Sequence[str]], local: int, share: bool = False) -> torch.device:
    """The device of a rank: in the order of their node-local numbers, ranks take the first GPU that is taken least.

    Arguments:
        wanted: ``cpu``, ``cuda``, or ``auto`` (``cuda`` where there is one).
        seen: Identities of the GPUs that every rank of the node sees, by node-local rank.
        local: This rank's node-local number.
        share: Whether ranks may share a GPU.

    Raises:
        UserError: if there is no GPU where one is wanted, or ranks would share one unasked; by all ranks that see a GPU.
    """
    if wanted == "cpu" or (wanted == "auto" and not seen[local]):
        return torch.device("cpu")
    taken: Counter[str] = Counter()
    picks = [_pick(gpus, taken) for gpus in seen]
    if not seen[local] or (len(taken) < sum(taken.values()) and not share):
        raise UserError(
            f"parallel.device: {len(seen)} ranks on this node for {len(taken)} GPUs; start one rank per GPU, "
            "or set parallel.share_device to true, or parallel.device to cpu"
        )
    return torch.device("cuda", picks[local])


def set_arithmetic(repeat: bool = False) -> None:
    """Let GPUs multiply numbers in float32 as they are: torch's convolutions would round them to 10 bits of mantissa (TF32).

    Arguments:
        repeat: Whether results are to repeat bit for bit. Kernels that add in one order are taken then; torch warns of an
            operation that has none.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if repeat:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS adds in one order then
        torch.use_deterministic_algorithms(True, warn_only=True)


def too_large(full: torch.cuda.OutOfMemoryError) -> UserError:
    """What a user may do about a GPU that is full, with what torch says of it."""
    facts = "; ".join(str(full).split(". ")[:3])
    return UserError(
        f"memory: {facts}; less is needed with execution.patches_at_once, execution.precision=bfloat16, a smaller sample.batch "
        "or more ranks: ddpatch plan says how much by a training"
    )


def _pick(gpus: Sequence[str], taken: Counter[str]) -> int:
    if not gpus:
        return -1
    least = min(gpus, key=lambda gpu: taken[gpu])
    taken[least] += 1
    return list(gpus).index(least)
