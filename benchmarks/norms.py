"""Time of norms that reduce over the channels of each point, forward and backward, in both memory layouts.

OMP_NUM_THREADS=1 python benchmarks/norms.py         # seconds
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from hardware import describe
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
SHAPE = (16, 32, 16, 16, 16)


def root_mean_square(x: Tensor, gain: Tensor) -> Tensor:
    """RMS norm of torch operations."""
    return x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt() * gain[:, None, None, None]


def fused_root_mean_square(x: Tensor, gain: Tensor) -> Tensor:
    """torch's RMS norm, channels moved last."""
    return F.rms_norm(x.movedim(1, -1), gain.shape, gain).movedim(-1, 1)


def fused_layer_norm(x: Tensor, gain: Tensor) -> Tensor:
    """torch's layer norm, channels moved last."""
    return F.layer_norm(x.movedim(1, -1), gain.shape, gain).movedim(-1, 1)


def milliseconds(norm: Callable[[Tensor, Tensor], Tensor], layout: torch.memory_format, repeats: int = 15) -> float:
    """Median of forward and backward together."""
    x = torch.randn(SHAPE).to(memory_format=layout).requires_grad_()
    gain = torch.ones(SHAPE[1], requires_grad=True)
    times = []
    for _ in range(repeats):
        start = time.process_time()
        norm(x, gain).sum().backward()
        times.append(1e3 * (time.process_time() - start))
    return statistics.median(times)


def main() -> None:
    """Measure and write the report."""
    torch.set_num_threads(1)
    layouts = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last_3d}
    lines = [
        f"# Norms over channels, {date.today()}",
        "",
        f"{describe()}; shape {list(SHAPE)}; process time of forward and backward, median of 15.",
        "`OMP_NUM_THREADS=1 python benchmarks/norms.py`",
        "",
        "| norm | contiguous, ms | channels-last, ms |",
        "|---|---|---|",
    ]
    for norm in (root_mean_square, fused_root_mean_square, fused_layer_norm):
        figures = [f"{milliseconds(norm, layout):.1f}" for layout in layouts.values()]
        lines.append(f"| {str(norm.__doc__).rstrip('.')} | {' | '.join(figures)} |")
    text = "\n".join(lines) + "\n"
    (RESULTS / f"norms_{platform.machine()}_{date.today()}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
