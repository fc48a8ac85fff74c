"""Groups of patches that travel: fields stay in host memory, and a group at a time is on the device.

    the device computes   |  group i        |  group i + 1
    host to device        |  group i + 1    |  group i + 2
    device to host        |  group i - 1    |  group i

Copies go through page-locked memory, each way on a stream of its own. Where fields are computed where they are nothing travels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Ferry:
    """Takes groups to the device and brings results home.

    Arguments:
        device: Where groups are computed.
        home: Where results belong.
    """

    def __init__(self, device: torch.device, home: torch.device) -> None:
        self.device, self.home = device, home
        gpu = device.type == "cuda" and device != home
        self._streams = (torch.cuda.Stream(device), torch.cuda.Stream(device)) if gpu else None

    def take(self, group: Sequence[Any]) -> list[Any]:
        """The members of a group, tensors on the device; the host does not wait for them, what the device computes next does."""
        return [self._send(x) if isinstance(x, Tensor) and x.device != self.device else x for x in group]

    def bring(self, result: Tensor, place: Tensor) -> Callable[[], None]:
        """Begin to copy a result to its place at home, where it is when what is returned has been called."""
        if self._streams is None:
            place.copy_(result)
            return lambda: None
        _, back = self._streams
        back.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(back):
            buffer = torch.empty(result.shape, dtype=result.dtype, pin_memory=True).copy_(result, non_blocking=True)
            there = back.record_event()
        result.record_stream(back)

        def land() -> None:
            there.synchronize()
            place.copy_(buffer)

        return land

    def _send(self, x: Tensor) -> Tensor:
        if self._streams is None:
            return x.to(self.device)
        out, now = self._streams[0], torch.cuda.current_stream(self.device)
        with torch.cuda.stream(out):
            sent = x.contiguous().pin_memory().to(self.device, non_blocking=True)
        now.wait_stream(out)
        sent.record_stream(now)  # its memory is of the other stream
        return sent
