"""The sum of gradients over all ranks, in flat buckets that start on their way while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ddpatch.parallel.comm import Communicator

BUCKET_BYTES = 2**22


class GradientSum:
    """Sums the gradients of parameters over all ranks, one non-blocking reduction per bucket.

    A bucket starts when the gradients of its parameters are there, and never before the one in front of it, so that all ranks
    start them in the same order, whatever the order in which their backward passes run. Parameters are taken last first, as a
    backward pass reaches them. A missing gradient counts as zero.

    Arguments:
        parameters: The parameters, in the same order on all ranks.
        comm: The ranks.
        bucket_bytes: Size from which on a bucket is full.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], comm: Communicator, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.comm = comm
        self.buckets = list(_fill([p for p in parameters if p.requires_grad][::-1], bucket_bytes))
        self._bucket_of = {p: i for i, bucket in enumerate(self.buckets) for p in bucket}
        self._hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in self._bucket_of]
        self._reset()

    def finish(self) -> None:
        """Wait until the gradients are the sums over all ranks. Collective, after one backward pass on every rank."""
        while len(self._started) < len(self.buckets):
            self._start()
        for bucket, pending in zip(self.buckets, self._started, strict=True):
            for p, part in zip(bucket, self.comm.finish_sum(pending).split([p.numel() for p in bucket]), strict=True):
                p.grad = part.view_as(p)
        self._reset()

    def release(self) -> None:
        """Leave the parameters to another sum."""
        for hook in self._hooks:
            hook.remove()

    def _reset(self) -> None:
        self._missing = [len(bucket) for bucket in self.buckets]
        self._started: list[Any] = []

    def _arrived(self, parameter: Tensor) -> None:
        self._missing[self._bucket_of[parameter]] -= 1  # type: ignore[index]
        while len(self._started) < len(self.buckets) and not self._missing[len(self._started)]:
            self._start()

    def _start(self) -> None:
        bucket = self.buckets[len(self._started)]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket])
        self._started.append(self.comm.start_sum(flat))


def _fill(parameters: list[nn.Parameter], most: int) -> Iterator[list[nn.Parameter]]:
    """Parameters in buckets; one of them may be larger than a bucket."""
    bucket: list[nn.Parameter] = []
    for p in parameters:
        bucket.append(p)
        if sum(q.nbytes for q in bucket) >= most:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
