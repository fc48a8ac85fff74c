"""Groups of patches that travel: fields stay in host memory, and a group at a time is on the device.

    the device computes   |  group i        |  group i + 1
    host to device        |  group i + 1    |  group i + 2
    device to host        |  group i - 1    |  group i

Copies go through page-locked memory, each way on a stream of its own. Where fields are computed where they are nothing travels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
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
        self._before: torch.cuda.Event | None = None

    def take(self, group: Sequence[Any]) -> list[Any]:
        """The members of a group, tensors on the device. Where some travel, this waits until all groups but the last one are
        computed: were the host further ahead, the device would hold more of the field.
        """
        travels = [isinstance(x, Tensor) and x.device != self.device for x in group]
        if any(travels) and self.device.type == "cuda":
            if self._before is not None:
                self._before.synchronize()
            self._before = torch.cuda.current_stream(self.device).record_event()
        return [self._send(x) if away else x for x, away in zip(group, travels, strict=True)]

    def bring(self, result: Tensor, place: Tensor) -> Callable[[], None]:
        """Begin to copy a result to its place at home, where it is when what is returned has been called."""
        if self.device.type != "cuda" or self.device == self.home:
            place.copy_(result)
            return lambda: None
        _, back = _streams(self.device)
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
        if self.device.type != "cuda":
            return send(x, self.device)
        out, now = _streams(self.device)[0], torch.cuda.current_stream(self.device)
        with torch.cuda.stream(out):
            sent = send(x, self.device)
        now.wait_stream(out)
        sent.record_stream(now)  # its memory is of the other stream
        return sent


def send(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, without waiting for what that is still to do."""
    held = x.contiguous().pin_memory() if device.type == "cuda" else x
    return held.to(device, non_blocking=True)


@cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """To a device and back from it: always the same, since memory that was allocated on a stream stays with it."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)
