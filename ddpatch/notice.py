"""Notice to leave: a signal, or the end of the time that a job has."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from types import FrameType

from ddpatch.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
BATCH_END, MARGIN_SECONDS = "SLURM_JOB_END_TIME", 120.0


class Notice:
    """Whether this process has been given notice: by SIGTERM or SIGUSR1 while this context is entered, by the end of its time
    limit, or by the end of its SLURM job, :data:`MARGIN_SECONDS` before it.

    Arguments:
        limit: Seconds from now on; ``None`` for no limit.
    """

    def __init__(self, limit: float | None = None) -> None:
        batch_end = os.environ.get(BATCH_END, "")
        ends = [time.time() + limit] if limit is not None else []
        ends += [float(batch_end) - MARGIN_SECONDS] if batch_end.isdigit() else []
        self._end, self._signalled = min(ends, default=float("inf")), False

    def __enter__(self) -> Notice:
        if threading.current_thread() is threading.main_thread():  # no other thread may handle signals
            self._earlier = {number: signal.signal(number, self._take) for number in SIGNALS}
        else:
            self._earlier = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def given(self) -> bool:
        """Whether to leave. Ranks may differ: agree before acting on it."""
        return self._signalled or time.time() >= self._end

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True


def parse_duration(text: str) -> float:
    """Seconds of a duration ``HH:MM:SS``, ``MM:SS`` or ``MM``, as batch systems write it.

    Raises:
        UserError: if it is something else.
    """
    if not re.fullmatch(r"\d+(:[0-5]?\d){0,2}", text):
        raise UserError(f"--time-limit: '{text}', expected HH:MM:SS, MM:SS or minutes")
    parts = [int(part) for part in text.split(":")]
    hours, minutes, seconds = {1: (0, *parts, 0), 2: (0, *parts), 3: tuple(parts)}[len(parts)]
    return 3600.0 * hours + 60.0 * minutes + seconds
