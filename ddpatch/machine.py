"""What a rank runs on: this machine's processor, as it is measured, or a GPU, as it is published."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from ddpatch.config import Config, build
from ddpatch.errors import UserError, nearest
from ddpatch.execution import keep_freed_memory, keeps_freed_memory
from ddpatch.io.volume import VolumeHeader
from ddpatch.model.layers import ResidualBlock
from ddpatch.parallel.comm import Communicator
from ddpatch.rehearsal import Rehearsal
from ddpatch.run import dtype

SPARE = 0.5  # of a step's arrays, once more, is what the C library keeps of freed memory: fitted (benchmarks/plan.py)
SHARE = 0.3  # of a GPU's peak: an assumption, to be replaced with what runs on it reach


class Gpu(NamedTuple):
    """Published figures: bytes of memory, and operations per second in float32 and float64, without tensor cores, and in bfloat16
    with them.
    """

    memory: float
    single: float
    double: float
    bfloat16: float


GPUS = {  # NVIDIA's data sheets of the A100 80GB, H100 and H200 for SXM
    "a100": Gpu(80e9, 19.5e12, 9.7e12, 312e12),
    "h100": Gpu(80e9, 67e12, 34e12, 989e12),
    "h200": Gpu(141e9, 67e12, 34e12, 989e12),
}


@dataclass(frozen=True)
class Device:
    """What a rank runs on.

    Attributes:
        name: ``cpu``, or a key of :data:`GPUS`.
        memory: Bytes that a rank may use.
        rate: Floating point operations per second.
        process: Bytes of the interpreter and its libraries, where they count.
        spare: Freed memory that is kept, as a share of the arrays of a step.
        source: Where the rate is from.
    """

    name: str
    memory: float
    rate: float
    process: int
    spare: float
    source: str


def find_device(name: str, config: Config, comm: Communicator, ranks_per_node: int, memory: float | None, share: float) -> Device:
    """What a rank runs on: this machine's processor, measured now, or a GPU by its published figures. Collective.

    Arguments:
        name: ``cpu``, or a key of :data:`GPUS`.
        config: Resolved configuration.
        comm: All ranks, of which any one would do.
        ranks_per_node: Ranks that share the memory of a node with processors.
        memory: Bytes of a rank, where they are given.
        share: Of a GPU's peak.

    Raises:
        UserError: for an unknown name or a number that makes no sense.
    """
    if name != "cpu" and name not in GPUS:
        raise UserError(f"--device: expected one of cpu, {', '.join(GPUS)}, got '{name}'{nearest(name, ['cpu', *GPUS])}")
    for option, value in {"--memory": memory, "--share": share, "--ranks-per-node": ranks_per_node}.items():
        if value is not None and not (0 < value < math.inf):
            raise UserError(f"{option}: expected a positive number, got {value:g}")
    if name == "cpu":
        keep_freed_memory(torch.device(name))
        own = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks_per_node
        threads = torch.get_num_threads()
        source = f"measured here on {threads} thread{'s' * (threads > 1)}"
        return Device(name, memory or own, probe(config), process_memory(config, comm), spare_share(torch.device(name)), source)
    gpu, lower = GPUS[name], config.execution.precision == "bfloat16"
    peak = gpu.bfloat16 if lower else gpu.double if config.train.dtype == "float64" else gpu.single
    return Device(name, memory or gpu.memory, share * peak, 0, 0.0, f"assumed, {share:.0%} of the published peak")


def free_memory(device: torch.device, comm: Communicator) -> float:
    """Bytes that this rank may still take: its share of what is free on its node, or on its GPU. Collective."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return free / comm.gather(os.uname().nodename).count(os.uname().nodename)


def spare_share(device: torch.device) -> float:
    """Freed memory that is kept, as a share of the arrays of a step."""
    return SPARE * (device.type == "cpu" and keeps_freed_memory())


def process_memory(config: Config, comm: Communicator) -> int:
    """Resident bytes of this process after a training step of a tiny network, which loads whatever a step needs. Collective."""
    axes = len(config.domain.patch)
    tree = {
        "domain": {"patch": [8] * axes, "grid": [8 * comm.size * 2, *[8] * (axes - 1)], "periodic": [True] * axes},
        "data": {"path": "none"},
        "model": {"channels": [2, 2], "tokens": 1, "token_channels": 1, "coarse_width": 4, "coarse_layers": 1, "coarse_heads": 1},
        "train": {"batch": 1, "optimiser": config.train.optimiser},
        "parallel": {"device": "cpu"},
        "execution": {"patches_at_once": 1},
    }
    tiny = build(tree, "plan")
    assert tiny.domain.grid is not None
    header = VolumeHeader(1, ("c0",), tiny.domain.grid, (1.0,) * axes, (True,) * axes)
    Rehearsal(tiny, header, comm).advance()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def probe(config: Config, times: int = 3) -> float:
    """Operations per second of this processor in the network's finest residual block on a patch, forward and backward."""
    width, embedding, patch = config.model.channels[0], 4 * config.model.channels[0], [min(n, 32) for n in config.domain.patch]
    kind = torch.bfloat16 if config.execution.precision == "bfloat16" else dtype(config)
    block = ResidualBlock(len(patch), width, width, embedding).to(dtype(config))
    x, noise = torch.randn(1, width, *patch, dtype=kind), torch.randn(1, embedding, dtype=kind)
    with FlopCounterMode(display=False) as counter:
        block(x.requires_grad_(), noise).sum().backward()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        block(x, noise).sum().backward()
        seconds.append(time.perf_counter() - start)
    return counter.get_total_flops() / min(seconds)
