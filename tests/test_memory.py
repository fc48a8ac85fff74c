"""With one patch at a time, memory is flat in the number of patches, apart from the field itself and the tokens."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from problems import field_of, small_config
from torch.profiler import ProfilerActivity, profile

from ddpatch.data.gaussian import PowerLaw
from ddpatch.diffusion.denoiser import Denoiser
from ddpatch.execution import keeps_freed_memory
from ddpatch.model.patches import cut
from ddpatch.parallel.collectives import Exchange
from ddpatch.parallel.comm import Communicator
from ddpatch.run import decompose, make_denoiser, make_model

PATCH, WIDTH = (32, 32), 32
FAULTS = """
import resource, torch
from ddpatch.execution import keep_freed_memory
keep_freed_memory(torch.device("cpu"))
for _ in range(20):  # until what is aligned fits into what was freed
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""
FIELD = 32 * 32 * 4  # bytes of a patch, in single precision
MAP = WIDTH * FIELD  # bytes of its features at the finest level


def denoiser_of(patches: int, at_once: int | None) -> tuple[Denoiser, torch.Tensor]:
    """A denoiser of a row of patches with one token each, and a field."""
    grid = (32, 32 * patches)
    config = small_config(
        Path("none"),
        "float32",
        domain={"patch": PATCH, "grid": grid, "periodic": [True, True]},
        model={"channels": [WIDTH, WIDTH], "tokens": 1, "coarse_layers": 1},
        execution={"patches_at_once": at_once},
    )
    decomposition = decompose(config, 1)
    field = field_of(PowerLaw().power(grid), 1, (2, 2), (0, patches // 2))
    exchange, model = Exchange(decomposition, Communicator(), 2), make_model(config, field)
    return make_denoiser(config, field, model, exchange), cut(torch.randn(1, 1, *grid), decomposition)


def peak(work: Callable[[], object]) -> int:
    """The most bytes that are allocated together."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    assert record.profiler is not None and record.profiler.kineto_results is not None
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def step(patches: int, at_once: int | None) -> int:
    """Peak of a training step."""
    denoiser, clean = denoiser_of(patches, at_once)
    sigma = torch.ones(1, dtype=torch.float64)
    return peak(lambda: denoiser.loss(clean, torch.randn_like(clean), sigma).backward())


def evaluation(patches: int, at_once: int | None) -> int:
    """Peak of an evaluation as samplers make it."""
    denoiser, x = denoiser_of(patches, at_once)
    with torch.no_grad():
        return peak(lambda: denoiser(x, torch.ones(1, dtype=torch.float64)))


@pytest.mark.parametrize("work", [step, evaluation])
def test_a_patch_more_costs_a_few_copies_of_its_field_and_no_features(work: Callable[[int, int | None], int]) -> None:
    more = work(32, 1) - work(4, 1)
    print(f"{work.__name__}: {more / (28 * FIELD):.1f} fields a patch")
    assert more < 28 * 6 * FIELD
    assert work(4, None) - work(2, None) > 2 * 3 * MAP  # the measure sees what all patches at once cost


@pytest.mark.skipif(not keeps_freed_memory(), reason="not glibc, or told by the environment")
def test_freed_memory_is_kept_unless_the_environment_says_otherwise() -> None:
    def faults(**environment: str) -> int:
        line = [sys.executable, "-c", FAULTS]
        done = subprocess.run(line, env={**os.environ, **environment}, capture_output=True, text=True, check=True, timeout=120)
        return int(done.stdout)

    assert faults() < 100
    assert faults(MALLOC_MMAP_THRESHOLD_="131072") > 100
