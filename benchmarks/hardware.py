"""What a report says of the machine that made it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def describe(threads: int = 1) -> str:
    """Processor, cores and torch, in a line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    cores = len(os.sched_getaffinity(0))
    per_rank = "one thread" if threads == 1 else f"{threads} threads"
    return f"{name}, {cores} core{'s' * (cores > 1)}, torch {torch.__version__}, {per_rank} per rank"
