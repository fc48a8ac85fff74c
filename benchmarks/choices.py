"""What two choices of execution are worth on a processor: keeping freed memory, and convolving one small patch in halves.

    python benchmarks/choices.py                # three minutes; needs a core to itself
    python benchmarks/choices.py --grid 128

Training steps with all patches of 32³ together and one at a time, as they are, and with an environment that tells the C library
something without effect (``MALLOC_PERTURB_=0``), so that it is left as it is (ddpatch/execution.py). Then forward and backward
passes of one convolution, whole and in halves (ddpatch/model/convolution.py). One core. The report goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from datetime import date
from typing import Any

import torch
import torch.nn.functional as F
from hardware import describe
from launch import launch
from reports import command, stem, table, write_rows
from step import Run, measure
from torch import Tensor

from ddpatch.execution import keep_freed_memory
from ddpatch.model.convolution import convolve
from ddpatch.parallel.comm import Communicator

LEFT_ALONE = {"MALLOC_PERTURB_": "0"}
PATCH, STEPS = 32, 2
CONVOLUTIONS = ((32, 18), (32, 10), (64, 10), (128, 10))  # channels, points per axis with the frame


def time_steps(at_once: int | None, grid: int) -> tuple[float, float]:
    """Seconds of a step, and bytes of its process."""
    found = measure(Run(1, "two-level", grid // PATCH, at_once=at_once), grid, STEPS, Communicator())
    return found["seconds"], found["memory"]


def time_convolution(channels: int, points: int, times: int = 15) -> tuple[float, float]:
    """Milliseconds of one forward and backward pass, whole and in halves."""
    torch.set_num_threads(1)
    keep_freed_memory(torch.device("cpu"))
    shapes = (1, channels, *(points,) * 3), (channels, channels, 3, 3, 3), (channels,)
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in shapes)

    def once(y: Tensor) -> None:
        torch.autograd.grad(y.sum(), (x, weight, bias))

    found = []
    for way in (F.conv3d, convolve):
        seconds = []
        for _ in range(times):
            start = time.perf_counter()
            once(way(x, weight, bias))
            seconds.append(time.perf_counter() - start)
        found.append(1e3 * statistics.median(seconds[times // 3 :]))
    return found[0], found[1]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, default=64, help="points per axis of the steps (default %(default)s)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        what = json.loads(args.worker)
        print(json.dumps(time_convolution(*what) if isinstance(what, list) else time_steps(what, args.grid)))
        return

    def run(what: object) -> tuple[float, float]:
        words = (__file__, "--grid", str(args.grid), "--worker", json.dumps(what))
        first, second = json.loads(launch(1, *words).splitlines()[-1])
        return first, second

    steps: list[dict[str, Any]] = []
    path = stem(f"choices_{args.grid}")
    for at_once in (None, 1):
        kept = run(at_once)
        os.environ.update(LEFT_ALONE)
        plain = run(at_once)
        for key in LEFT_ALONE:
            del os.environ[key]
        steps.append(
            {"at_once": at_once or "all", "seconds": kept[0], "bytes": kept[1], "plain": plain[0], "plain_bytes": plain[1]}
        )
        print(steps[-1], flush=True)
    convolutions = [(channels, points, *run([channels, points])) for channels, points in CONVOLUTIONS]
    write_rows(path.with_suffix(".csv"), steps)
    lines = [
        f"# Choices of execution, {date.today()}",
        "",
        f"{describe()}, {os.confstr('CS_GNU_LIBC_VERSION')}. `{command()}`",
        "",
        f"A training step at {args.grid}³ × 3, patches of {PATCH}³, U-Net 32-64-128; with groups freed memory is not kept.",
        "",
        *table(
            ("patches at once", "s as it is", "s, C library left alone", "GB as it is", "GB, left alone"),
            [
                (
                    r["at_once"],
                    f"{r['seconds']:.2f}",
                    f"{r['plain']:.2f}",
                    f"{r['bytes'] / 1e9:.2f}",
                    f"{r['plain_bytes'] / 1e9:.2f}",
                )
                for r in steps
            ],
        ),
        "One convolution of one patch, 3³, forward and backward:",
        "",
        *table(
            ("channels", "points with the frame", "ms whole", "ms in halves"),
            [(c, f"{n}³", f"{whole:.2f}", f"{halves:.2f}") for c, n, whole, halves in convolutions],
        ),
    ]
    path.with_suffix(".md").write_text("\n".join(lines))
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
