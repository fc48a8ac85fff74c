"""What choices of execution are worth on a processor: freed memory that is kept, one small patch in halves, fewer operations.

    python benchmarks/choices.py                # four minutes; needs a core to itself
    python benchmarks/choices.py --grid 128

Training steps with all patches of 32³ together and one at a time, as they are, and with an environment that tells the C library
something without effect (``MALLOC_PERTURB_=0``), so that it is left as it is (ddpatch/execution.py). Then forward and backward
passes: of one convolution, whole and in halves (ddpatch/model/convolution.py); of what merges levels, and of a norm that takes
over scale and shift, each beside the same operation by operation (ddpatch/model/interpolation.py, layers.py). Forward passes: of
the linear part's stencil, point by point and in Fourier space; of the orthogonalised steps of all matrices of the network, by an
iteration on each of them and on its square (ddpatch/optimiser.py). One core. The report goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from typing import Any

import torch
import torch.nn.functional as F
from hardware import describe
from launch import launch
from reports import command, stem, table, write_rows
from step import Run, measure, velocities
from torch import Tensor

from ddpatch.execution import keep_freed_memory
from ddpatch.model.convolution import CONV, convolve, convolve_few
from ddpatch.model.interpolation import Interpolation, doubled, map_rows, merge
from ddpatch.model.layers import Gain, normalise
from ddpatch.model.tokens import neighbours, spline_weights
from ddpatch.optimiser import ITERATION, orthogonalise
from ddpatch.optimiser import STEPS as TIMES
from ddpatch.parallel.comm import Communicator
from ddpatch.rehearsal import white_field
from ddpatch.run import make_model, make_optimiser

LEFT_ALONE = {"MALLOC_PERTURB_": "0"}
PATCH, STEPS = 32, 2
PATCHES, WIDTH, TOKENS = 8, 32, 4  # of the merge, which is that of a step at 64³
RING = neighbours(2, 1, PATCH // TOKENS)
CONVOLUTIONS = ((32, 18), (32, 10), (64, 10), (128, 10))  # channels, points per axis with the frame


def time_steps(at_once: int | None, grid: int) -> tuple[float, float]:
    """Seconds of a step, and bytes of its process."""
    found = measure(Run(1, "two-level", grid // PATCH, at_once=at_once), grid, STEPS, Communicator())
    return found["seconds"], found["memory"]


def time_convolution(channels: int, points: int) -> tuple[float, float]:
    """Milliseconds of one forward and backward pass, whole and in halves."""
    shapes = (1, channels, *(points,) * 3), (channels, channels, 3, 3, 3), (channels,)
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in shapes)
    return compare([lambda: F.conv3d(x, weight, bias), lambda: convolve(x, weight, bias)], [x, weight, bias])


def time_merge(channels: int = WIDTH) -> tuple[float, float]:
    """Milliseconds of the finest merge of 8 patches, operation by operation and as it is: forward and backward passes."""
    gain, conv, embedding = Gain(2 * channels, channels), CONV[3](2 * channels, channels, 1), torch.randn(1, channels)
    inputs = [features(PATCH // 2, channels), features(PATCH + 2, channels), features(TOKENS + 2 * RING, channels)]
    coarse, skip, tokens = inputs
    cell = PATCH // TOKENS

    def splines() -> Interpolation:
        return Interpolation(tokens.movedim(1, -1), [spline_weights(TOKENS, cell, 2, RING, 1, tokens.device)] * 3)

    def step_by_step() -> Tensor:
        wide = torch.cat([doubled(coarse, rim=1).points(), skip], dim=1)
        return conv(gain(wide, embedding.expand(PATCHES, -1))) + splines().points()

    def as_it_is() -> Tensor:
        to_coarse, to_skip = gain.scaled(conv, embedding).chunk(2, dim=2)
        assert conv.bias is not None
        return merge(skip, to_skip, conv.bias, [doubled(map_rows(coarse, to_coarse), rim=1), splines()])

    return compare([step_by_step, as_it_is], [*inputs, *gain.parameters(), *conv.parameters()])


def time_norm(channels: int = WIDTH) -> tuple[float, float]:
    """Milliseconds of a norm of 8 patches, scaled and shifted afterwards and as it is: forward and backward passes."""
    x = features(PATCH + 2, channels).movedim(1, -1)
    gain, bias, *modulation = (
        torch.randn(shape, requires_grad=True) for shape in ((channels,), (channels,), (1, channels), (1, channels))
    )
    scale, shift = modulation
    ways = [lambda: normalise(x, gain, bias) * scale + shift, lambda: normalise(x, gain, bias, scale, shift)]
    return compare(ways, [x, gain, bias, scale, shift])


def time_stencil(channels: int = 3, reach: int = 4) -> tuple[float, float]:
    """Milliseconds of the linear part's stencil on 8 patches, point by point and as it is."""
    x = torch.randn(PATCHES, channels, *(PATCH + 2 * reach,) * 3)
    kernel = torch.randn(channels, channels, *(2 * reach + 1,) * 3)
    return compare([lambda: convolve(x, kernel), lambda: convolve_few(x, kernel)], [])


def time_orthogonal_steps() -> tuple[float, float]:
    """Milliseconds of what makes the steps of all matrices of the default network, on the matrices themselves and as it is."""
    config = Run(1, "two-level", 2).config(2 * PATCH)
    optimiser = make_optimiser(config, make_model(config, white_field(config, velocities(2 * PATCH))))
    matrices = [torch.randn_like(p).flatten(1) for p in optimiser.param_groups[0]["params"]]

    def all_by(way: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.stack([way(matrix).norm() for matrix in matrices])

    return compare([lambda: all_by(iterated), lambda: all_by(orthogonalise)], [])


def iterated(matrix: Tensor) -> Tensor:
    """U V^T by the iteration on the matrix."""
    if matrix.shape[0] > matrix.shape[1]:
        return iterated(matrix.T).T
    (a, b, c), x = ITERATION, matrix / (matrix.norm() + 1e-7)
    for _ in range(TIMES):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


def features(points: int, channels: int) -> Tensor:
    """Features of 8 patches, channels last in memory."""
    return torch.randn(PATCHES, *(points,) * 3, channels).movedim(-1, 1).requires_grad_()


def compare(ways: Sequence[Callable[[], Tensor]], inputs: list[Tensor], times: int = 15) -> tuple[float, float]:
    """Milliseconds of two ways and of their gradients with respect to the inputs, if any."""
    torch.set_num_threads(1)
    keep_freed_memory(torch.device("cpu"))
    seconds: list[list[float]] = [[], []]
    for _ in range(times):
        for taken, way in zip(seconds, ways, strict=True):
            start = time.perf_counter()
            y = way()
            if inputs:
                torch.autograd.grad(y, inputs, torch.ones_like(y))
            taken.append(time.perf_counter() - start)
    first, second = (1e3 * statistics.median(each[times // 3 :]) for each in seconds)
    return first, second


SMALL: dict[str, Callable[[], tuple[float, float]]] = {
    "finest merge: operation by operation; as it is": time_merge,
    "norm with scale and shift: one after the other; as it is": time_norm,
    "linear part's stencil, forward: point by point; as it is": time_stencil,
    "steps of all matrices: by iterations on them; as it is": time_orthogonal_steps,
}


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, default=64, help="points per axis of the steps (default %(default)s)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        what = json.loads(args.worker)
        if isinstance(what, str):
            print(json.dumps(SMALL[what]()))
        else:
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
    small = [(name, *run(name)) for name in SMALL]
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
        f"{PATCHES} patches of {PATCH}³ with a rim, {WIDTH} channels, {TOKENS}³ tokens; forward and backward, or as said:",
        "",
        *table(("what, two ways", "ms, the first", "ms, the second"), [(name, f"{a:.1f}", f"{b:.1f}") for name, a, b in small]),
    ]
    path.with_suffix(".md").write_text("\n".join(lines))
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
