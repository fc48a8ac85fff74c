"""Seconds of a collective step, by what they went to.

Times of kinds of communication are those between call and return: on a GPU they include the kernels that have to end before.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable

from torch import nn

from ddpatch.training import Training

KINDS = {"halo": ("halo", "roll"), "gather": ("allgather", "reduce_scatter"), "sums": ("allreduce", "union")}
SPENT = ("compute", "coarse", *KINDS, "io")
MEASURED = (*SPENT, "total", "faults")
WARM_UP = 3  # steps, after which the C library's memory is all there: every array of features that it lacks is a page fault


class Stopwatch:
    """Adds up the seconds inside a module, in its forward and its backward pass."""

    def __init__(self, module: nn.Module) -> None:
        self.seconds = 0.0
        module.register_forward_pre_hook(self._start)
        module.register_forward_hook(self._stop)
        module.register_full_backward_pre_hook(self._start)
        module.register_full_backward_hook(self._stop)

    def _start(self, *_: object) -> None:
        self._began = time.perf_counter()

    def _stop(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._began


def measure(step: Callable[[], object], training: Training, steps: int) -> dict[str, float]:
    """Median over the steps of the most seconds of any rank, in all and for every name in :data:`SPENT`. Collective.

    :data:`WARM_UP` steps before them are not counted. Each entry has its own slowest rank, so that they need not add up to
    ``total``. ``faults``: pages that the kernel had to find for a rank in a step.
    """
    watch, found = Stopwatch(training.model.coarse), []
    for _ in range(WARM_UP + steps):
        training.comm.barrier()
        before, faults, start = _spent(training, watch), _faults(), time.perf_counter()
        step()
        total, faults = time.perf_counter() - start, _faults() - faults
        row = {name: seconds - before[name] for name, seconds in _spent(training, watch).items()}
        ranks = training.comm.gather({**row, "compute": total - sum(row.values()), "total": total, "faults": faults})
        found.append({key: max(rank[key] for rank in ranks) for key in ranks[0]})
    return {key: statistics.median(row[key] for row in found[WARM_UP:]) for key in MEASURED}


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _spent(training: Training, watch: Stopwatch) -> dict[str, float]:
    kinds = {name: sum(training.comm.seconds_by_kind[kind] for kind in kinds) for name, kinds in KINDS.items()}
    return {**kinds, "coarse": watch.seconds, "io": training.batches.seconds}
