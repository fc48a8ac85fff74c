"""What a report says of the machine that made it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def describe(threads: int = 1) -> str:
    """Processor, cores and torch, in a line."""
    pairs = (line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in pairs}
    name = facts.get("model name", platform.machine())
    if "cpu family" in facts:  # some clouds hide the rest of the name
        name += f" (family {facts['cpu family']}, model {facts['model']})"
    cores = len(os.sched_getaffinity(0))
    per_rank = "one thread" if threads == 1 else f"{threads} threads"
    return f"{name}, {cores} core{'s' * (cores > 1)}, torch {torch.__version__}, {per_rank} per rank"
