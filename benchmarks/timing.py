"""Seconds of a collective step, by what they went to.

Times of kinds of communication are those between call and return: on a GPU they include the kernels that have to end before.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from torch import nn

from ddpatch.training import Training

KINDS = {"halo": ("halo", "roll"), "gather": ("allgather", "reduce_scatter"), "sums": ("allreduce", "union")}
SPENT = ("compute", "coarse", *KINDS, "io")


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

    One step before them is not counted. Each entry has its own slowest rank, so that they need not add up to ``total``.
    """
    watch, found = Stopwatch(training.model.coarse), []
    for _ in range(1 + steps):
        training.comm.barrier()
        before, start = _spent(training, watch), time.perf_counter()
        step()
        total = time.perf_counter() - start
        row = {name: seconds - before[name] for name, seconds in _spent(training, watch).items()}
        ranks = training.comm.gather({**row, "compute": total - sum(row.values()), "total": total})
        found.append({key: max(rank[key] for rank in ranks) for key in ranks[0]})
    return {key: statistics.median(row[key] for row in found[1:]) for key in (*SPENT, "total")}


def _spent(training: Training, watch: Stopwatch) -> dict[str, float]:
    kinds = {name: sum(training.comm.seconds_by_kind[kind] for kind in kinds) for name, kinds in KINDS.items()}
    return {**kinds, "coarse": watch.seconds, "io": training.batches.seconds}
