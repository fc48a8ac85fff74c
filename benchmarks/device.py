"""A training step on one device, held against what the device can do: products of matrices, and copies of memory.

    python benchmarks/device.py --threads 8                                            # meant for a GPU with 80 GB
    python benchmarks/device.py --threads 8 --cube --patches 8 --channels 32 64 128    # there: 1024³ points, a patch at a time
    python benchmarks/device.py --patch 32 --patches 8 --channels 32 64 128            # a processor with one thread

On a GPU two questions more: what it would gain to round the factors of products in float32 (TF32), which ddpatch does not do,
and what, to let cuDNN measure its convolutions before it chooses one.

Whole steps of the optimiser (:meth:`ddpatch.training.Training.advance`) on a row, or a cube, of patches of white noise, on the
GPU if there is one. Every way of execution runs in a process of its own. Operations are those of convolutions and matrix products
(ddpatch/ledger.py; with those that groups repeat), their peak that of the product of two square matrices of the same type.
Traffic is what all other operations read and write, were nothing in a cache, and its peak that of a copy. Where the host waits
for a number, the device may idle: that is counted too, less what a profile of nothing has. While the device works, the host reads
the next batch and draws its noise, which by itself takes what the last column says. The report goes to benchmarks/results/, with
the largest entries of a profile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hardware import describe
from launch import launch
from problem import open_training
from reports import command, stem, table, write_rows
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpatch.execution import computes_bfloat16
from ddpatch.ledger import FLOPS
from ddpatch.log import peak_memory
from ddpatch.parallel.comm import Communicator
from ddpatch.rehearsal import rehearse

LOWER: dict[str, Any] = {"precision": "bfloat16"}
SINGLY: dict[str, Any] = {"patches_at_once": 1}


class Way(NamedTuple):
    """How a step is executed: keys of the configuration's section, and, on GPUs only, whether factors in float32 are rounded to
    TF32, and whether cuDNN measures which convolution is fastest.
    """

    execution: dict[str, Any]
    rounded: bool = False
    measured: bool = False


WAYS = {
    "as it is": Way({}),
    "factors rounded to TF32": Way({}, rounded=True),
    "a patch at a time": Way(SINGLY),
    "bfloat16": Way(LOWER),
    "bfloat16, convolutions measured": Way(LOWER, measured=True),
    "bfloat16, compiled": Way(LOWER | {"compile": True}),
    "bfloat16, compiled, convolutions measured": Way(LOWER | {"compile": True}, measured=True),
    "bfloat16, compiled, a patch at a time": Way(LOWER | SINGLY | {"compile": True}),
}
SIDES = {"cpu": 2048, "cuda": 8192}  # of the matrices; a copy has as many bytes as four of them
ENTRIES = 12
Row = dict[str, Any]


class Traffic(TorchDispatchMode):
    """Adds up the bytes that operations other than convolutions and matrix products read and write."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make one operation."""
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket not in FLOPS and not func.is_view:
            self.bytes += sum(x.nbytes for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor))
        return result


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(action: Callable[[], object], device: torch.device) -> float:
    """Of one action."""
    wait(device)
    start = time.perf_counter()
    action()
    wait(device)
    return time.perf_counter() - start


def measure_peaks(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Operations per second in products of matrices, and bytes per second in copies."""
    matrix = torch.randn(SIDES[device.type], SIDES[device.type], device=device).to(dtype)
    source = torch.ones(4 * matrix.nbytes, dtype=torch.uint8, device=device)
    copied = torch.empty_like(source)
    product = min(seconds(lambda: matrix @ matrix, device) for _ in range(4))
    copy = min(seconds(lambda: copied.copy_(source), device) for _ in range(4))
    return 2 * len(matrix) ** 3 / product, 2 * source.nbytes / copy


def possible(way: Way, device: torch.device) -> bool:
    """Whether it makes a difference here."""
    lower, gpu = "precision" in way.execution, device.type == "cuda"
    return (not lower or computes_bfloat16(device)) and (gpu or not (way.rounded or way.measured))


def ways(device: torch.device, cube: bool) -> list[str]:
    """Those that are measured: of a cube the one that needs least memory."""
    names = [name for name, way in WAYS.items() if possible(way, device)]
    return [name for name in names if "patches_at_once" in WAYS[name].execution][-1:] if cube else names


def measure(name: str, args: argparse.Namespace) -> Row:
    """One way of execution in this process."""
    way, comm, model, side = WAYS[name], Communicator(), {"channels": args.channels}, args.patch * args.patches
    grid = (side,) * 3 if args.cube else (side, args.patch, args.patch)
    with (
        tempfile.TemporaryDirectory() as folder,
        open_training(Path(folder), grid, (args.patch,) * 3, model, comm, way.execution, measured=False) as training,
    ):
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = way.rounded
        torch.backends.cudnn.benchmark = way.measured
        device, execution = training.device, training.config.execution
        first = seconds(training.advance, device)
        taken = statistics.median([seconds(training.advance, device) for _ in range(1 + args.steps)][1:])
        memory, traffic, batch = peak_memory(device), Traffic(), seconds(training.next_batch, device)
        found = profiled(training.advance, device)
        waits = count_waits(found) - count_waits(profiled(lambda: None, device))
        if not execution.compile:
            with traffic:
                training.advance()
        flops = rehearse(training.config, training.batches.file.header, 1).step.flops
    peak, bandwidth = measure_peaks(torch.bfloat16 if execution.precision == "bfloat16" else torch.float32, device)
    return {
        "way": name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "processor",
        "seconds": taken,
        "first": first,
        "batch": batch,
        "memory": memory,
        "flops": flops,
        "peak": peak,
        "traffic": traffic.bytes,
        "bandwidth": bandwidth,
        "waits": waits,
        "entries": entries(found, device),
    }


def profiled(action: Callable[[], object], device: torch.device) -> profile:
    """The profile of one action."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as found:
        seconds(action, device)
    return found


def count_waits(found: profile) -> int:
    """How often the host waited for a GPU."""
    return sum(entry.count for entry in found.key_averages() if "Synchronize" in entry.key)


def entries(found: profile, device: torch.device) -> list[tuple[str, int, float]]:
    """Name, calls and seconds of the largest entries: kernels on a GPU, operations on a processor."""
    gpu = device.type == "cuda"
    wanted = [entry for entry in found.key_averages() if entry.device_type.name == ("CUDA" if gpu else "CPU")]
    times = [(e.key[:80], e.count, (e.self_device_time_total if gpu else e.self_cpu_time_total) / 1e6) for e in wanted]
    return sorted(times, key=lambda entry: -entry[2])[:ENTRIES]


def report(rows: list[Row], args: argparse.Namespace) -> str:
    """The Markdown page."""
    patches = args.patches**3 if args.cube else args.patches
    voxels, fastest = patches * args.patch**3, min(rows, key=lambda row: row["seconds"])
    lines = [
        f"# A training step on one device, {date.today()}",
        "",
        f"{rows[0]['device']}; host: {describe(args.threads)}. `{command()}`",
        "",
        f"{patches} patches of {args.patch}³ × 3, U-Net {'-'.join(map(str, args.channels))}, batch 1.",
        "",
        *table(
            (
                "execution",
                "s",
                "kvoxel/s",
                "TFLOP/s, of the peak",
                "traffic of the rest",
                "GB",
                "waits of the host",
                "first step, s",
                "a batch, s",
            ),
            [cells(row, voxels) for row in rows],
        ),
        f"Where the time of '{fastest['way']}' goes, in a profile:",
        "",
        *table(("entry", "calls", "ms", "of the step"), lines_of(fastest)),
    ]
    return "\n".join(lines)


def cells(row: Row, voxels: int) -> list[str]:
    """A row of the table."""
    rate, moved = row["flops"] / row["seconds"], row["traffic"] / row["seconds"] / row["bandwidth"]
    return [
        row["way"],
        f"{row['seconds']:.3f}",
        f"{voxels / row['seconds'] / 1e3:.1f}",
        f"{rate / 1e12:.3g}, {rate / row['peak']:.0%} of {row['peak'] / 1e12:.3g}",
        f"{row['traffic'] / 1e9:.1f} GB, {moved:.0%} of {row['bandwidth'] / 1e9:.4g} GB/s" if row["traffic"] else "fused",
        f"{row['memory'] / 1e9:.2f}",
        str(row["waits"]) if row["device"] != "processor" else "",
        f"{row['first']:.1f}",
        f"{row['batch']:.3f}",
    ]


def lines_of(row: Row) -> list[list[str]]:
    """The largest entries of its profile."""
    return [[f"`{name}`", str(calls), f"{1e3 * s:.1f}", f"{s / row['seconds']:.1%}"] for name, calls, s in row["entries"]]


def main() -> None:
    """Measure every way in a process of its own, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", type=int, default=128, help="points per axis (default %(default)s)")
    parser.add_argument("--patches", type=int, default=2, help="in a row (default %(default)s)")
    parser.add_argument("--cube", action="store_true", help="as many along every axis, and a patch at a time only")
    parser.add_argument("--channels", type=int, nargs="+", default=[128, 256, 512], help="of the U-Net (default 128 256 512)")
    parser.add_argument("--steps", type=int, default=3, help="timed, after two that are not (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of the host (default %(default)s)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.worker, args)))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = [f"--{key}={getattr(args, key)}" for key in ("patch", "patches", "steps", "threads")]
    options += ["--channels", *map(str, args.channels)] + ["--cube"] * args.cube
    rows: list[Row] = []
    path = stem(f"device_{device.type}" + "-cube" * args.cube)
    for name in ways(device, args.cube):
        rows.append(json.loads(launch(1, __file__, *options, "--worker", name, threads=args.threads).splitlines()[-1]))
        print({key: value for key, value in rows[-1].items() if key != "entries"}, flush=True)
        write_rows(path.with_suffix(".csv"), [{k: v for k, v in row.items() if k != "entries"} for row in rows])
        path.with_suffix(".md").write_text(report(rows, args))
    print(report(rows, args))


if __name__ == "__main__":
    main()
