"""Side by side with what one would take instead: MONAI's U-Net on the whole volume, and a U-Net cut into slabs.

    pip install -c constraints.txt -e .[mpich,peers]
    python benchmarks/peers.py                  # about half an hour on two cores; needs them to itself

Training steps and evaluations on the same volume of white noise, with the same preconditioned loss and Adam, one thread per rank.
Contenders take turns. MONAI: DiffusionModelUNet, one residual block per level, no attention but in its middle block, which is
asked to be memory-efficient. Slabs: benchmarks/slabs.py, every convolution with a halo of its own, every norm with a sum over
ranks. ddpatch: at equal widths, and with a coarsest level so wide that it has as many parameters as MONAI's network. Calls and
bytes are those of rank 0, sums of gradients included. Memory is the high-water mark of a process (VmHWM), all ranks summed; the
largest cube is extrapolated from two volumes, linearly in the points. The report goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from importlib import import_module
from typing import Any

import torch
from hardware import describe
from launch import launch
from reports import command, listed, met, stem, table, write_rows
from slabs import SlabUNet
from torch import Tensor, nn

from ddpatch.config import build
from ddpatch.diffusion.denoiser import Denoiser
from ddpatch.execution import computes_bfloat16, keep_freed_memory
from ddpatch.io.volume import VolumeHeader
from ddpatch.log import peak_memory
from ddpatch.parallel.collectives import Exchange
from ddpatch.parallel.comm import Communicator
from ddpatch.parallel.gradients import GradientSum
from ddpatch.rehearsal import white_field
from ddpatch.run import decompose, make_denoiser, make_model

WIDTHS, EQUAL, CHANNELS, PATCH, EVALUATIONS = (32, 64, 128), (32, 64, 180), 3, 32, 20
CPU, LIMIT = torch.device("cpu"), 24 * 2**30  # bytes
Row = dict[str, Any]


@dataclass(frozen=True)
class Contender:
    """Whose network, on how many ranks, and how it is executed."""

    who: str
    ranks: int = 1
    precision: str = "full"
    widths: tuple[int, ...] = WIDTHS
    at_once: int | None = None


MONAI, OURS, SLABS, TWO, STREAMED = (
    "MONAI",
    "ddpatch, equal parameters",
    "slabs, 2 ranks",
    "ddpatch, 2 ranks",
    "ddpatch, a patch at a time",
)
CONTENDERS = {
    MONAI: Contender("monai"),
    "MONAI, bfloat16": Contender("monai", precision="bfloat16"),
    OURS: Contender("ddpatch", widths=EQUAL),
    "ddpatch, equal parameters, bfloat16": Contender("ddpatch", precision="bfloat16", widths=EQUAL),
    STREAMED: Contender("ddpatch", at_once=1),
    "slabs, 1 rank": Contender("slabs"),
    "ddpatch, 1 rank": Contender("ddpatch"),
    SLABS: Contender("slabs", 2),
    TWO: Contender("ddpatch", 2),
}


def make(contender: Contender, grid: int, comm: Communicator) -> tuple[Denoiser, nn.Module, tuple[int, ...]]:
    """The denoiser, its network, and the shape of the fields that this rank has. Collective."""
    if contender.who == "monai":
        network: nn.Module = import_module("monai.networks.nets").DiffusionModelUNet(
            spatial_dims=3,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_res_blocks=1,
            channels=contender.widths,
            attention_levels=(False,) * len(contender.widths),
            num_head_channels=contender.widths[0],
            use_flash_attention=True,
        )
        network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        lower = contender.precision == "bfloat16"

        def call(x: Tensor, noise: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=lower):
                return network(x, noise).to(x)

        return Denoiser(call), network, (1, CHANNELS, grid, grid, grid)
    if contender.who == "slabs":
        network = SlabUNet(CHANNELS, contender.widths, comm)
        return Denoiser(network), network, (1, CHANNELS, grid // comm.size, grid, grid)
    tree = {
        "domain": {"patch": [PATCH] * 3, "grid": [grid] * 3, "periodic": [True] * 3},
        "data": {"path": "none"},
        "model": {"channels": list(contender.widths)},
        "diffusion": {"weighting": "edm"},
        "execution": {"precision": contender.precision, "patches_at_once": contender.at_once},
    }
    config = build(tree, "benchmark")
    field = white_field(config, VolumeHeader(1, ("u", "v", "w"), (grid,) * 3, (1.0,) * 3, (True,) * 3))
    exchange = Exchange(decompose(config, comm.size), comm, config.model.reach)
    model = make_model(config, field)
    return make_denoiser(config, field, model, exchange), model, (1, len(exchange.patches), CHANNELS, *config.domain.patch)


def measure(contender: Contender, grid: int, steps: int, comm: Communicator) -> Row:
    """Medians of a training step and of an evaluation. Collective."""
    torch.set_num_threads(1)
    keep_freed_memory(CPU, contender.at_once)
    torch.manual_seed(0)
    denoiser, network, shape = make(contender, grid, comm)
    optimiser, sums = torch.optim.Adam(network.parameters()), GradientSum(network.parameters(), comm)
    clean, noise, sigma = torch.randn(shape), torch.randn(shape), torch.ones(1, dtype=torch.float64)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        (denoiser.loss(clean, noise, sigma) / (CHANNELS * grid**3)).backward()
        sums.finish()
        optimiser.step()

    @torch.no_grad()
    def evaluate() -> None:
        denoiser(clean, sigma)

    train = timed(step, comm, steps)
    memory = sum(comm.gather(peak_memory(CPU)))
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        **{f"train_{key}": value for key, value in train.items()},
        **{f"evaluation_{key}": value for key, value in timed(evaluate, comm, steps).items()},
        "memory": memory,
    }


def timed(action: Callable[[], None], comm: Communicator, steps: int) -> Row:
    """Median seconds, and calls and bytes of one. One more before them is not counted. Collective."""
    seconds = []
    for _ in range(steps + (steps > 1)):
        calls, sent = comm.calls.total(), comm.bytes.total()
        comm.barrier()
        start = time.perf_counter()
        action()
        seconds.append(max(comm.gather(time.perf_counter() - start)))
    return {
        "seconds": statistics.median(seconds[steps > 1 :]),
        "calls": (comm.calls.total() - calls) * (comm.size > 1),
        "bytes": (comm.bytes.total() - sent) * (comm.size > 1),
    }


def report(rows: list[Row], grids: tuple[int, int]) -> str:
    """The Markdown page."""
    large = {row["contender"]: row for row in rows if row["grid"] == grids[1]}
    rounds = sorted({row["round"] for row in rows})
    timed_rows = [{row["contender"]: row for row in rows if row["grid"] == grids[0] and row["round"] == i} for i in rounds]
    header = (
        "contender",
        "parameters",
        "s per step",
        "kvoxel/s",
        "s per sample",
        "calls",
        "MB sent",
        "GB",
        "fits into 24 GiB",
    )
    lines = [
        f"# Side by side at {grids[0]}³ × 3 channels, {date.today()}",
        "",
        f"{describe()}. `{command()}`",
        "",
        f"A sample is {EVALUATIONS} evaluations; calls and MB are of a training step; GB of all ranks.",
        "",
        *table(header, [[name, *cells([each[name] for each in timed_rows], large[name], grids)] for name in timed_rows[0]]),
        *table(("bar", "found", "met"), list(bars(timed_rows))),
    ]
    return "\n".join(lines)


def cells(rows: list[Row], large: Row, grids: tuple[int, int]) -> list[str]:
    """What the rounds of one contender come to."""
    seconds, evaluation = (statistics.median(r[f"{what}_seconds"] for r in rows) for what in ("train", "evaluation"))
    memory = rows[0]["memory"]
    slope = (large["memory"] - memory) / (grids[1] ** 3 - grids[0] ** 3)
    cube = int((grids[0] ** 3 + (LIMIT - memory) / slope) ** (1 / 3)) if slope > 0 else 0
    speed = f"{grids[0] ** 3 / seconds / 1e3:.1f}"
    sent = [str(rows[0]["train_calls"]), f"{rows[0]['train_bytes'] / 1e6:.2f}"]
    return [
        str(rows[0]["parameters"]),
        f"{seconds:.2f}",
        speed,
        f"{evaluation * EVALUATIONS:.1f}",
        *sent,
        f"{memory / 1e9:.2f}",
        f"{cube}³",
    ]


def bars(rounds: list[dict[str, Row]]) -> Iterable[list[str]]:
    """What the issue asks for, as it was found."""

    def ratios(key: str, one: str, other: str) -> list[float]:
        return [each[one][key] / each[other][key] for each in rounds]

    for what in ("train", "evaluation"):
        found = ratios(f"{what}_seconds", OURS, MONAI)
        yield [f"{what}: less time than MONAI, equal parameters", listed(found), met(statistics.median(found) < 1)]
        found = ratios(f"{what}_seconds", TWO, SLABS)
        yield [f"{what}: no more time than slabs, 2 ranks", listed(found), met(statistics.median(found) <= 1)]
        for key in ("calls", "bytes"):
            found = ratios(f"{what}_{key}", SLABS, TWO)[:1]
            yield [f"{what}: fewer {key} than slabs, 2 ranks", f"{found[0]:.1f} times fewer", met(found[0] > 1)]


def main() -> None:
    """Let the contenders take turns, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", type=int, nargs=2, default=(64, 96), help="points per axis: timed, and for memory alone")
    parser.add_argument(
        "--steps", type=int, default=3, help="timed steps of a launch, after one that is not (default %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=2, help="launches of every contender (default %(default)s)")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        comm, (name, grid, steps) = Communicator(), args.worker
        found = measure(CONTENDERS[name], int(grid), int(steps), comm)
        if comm.rank == 0:
            print(json.dumps(found))
        return
    rows: list[Row] = []
    path = stem("peers")
    names = [n for n, c in CONTENDERS.items() if c.precision == "full" or computes_bfloat16(CPU)]
    turns = [(args.grids[1], 0, 1), *((args.grids[0], i, args.steps) for i in range(args.rounds))]
    for grid, number, steps in turns:
        for name in names:
            worker = ("--worker", name, str(grid), str(steps))
            found = json.loads(launch(CONTENDERS[name].ranks, __file__, *worker).splitlines()[-1])
            rows.append({"contender": name, "grid": grid, "round": number, **found})
            print(rows[-1], flush=True)
        write_rows(path.with_suffix(".csv"), rows)
    text = report(rows, tuple(args.grids))
    path.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
