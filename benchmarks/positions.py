"""Does the positional encoding of patches help where the field is inhomogeneous, and does it hurt where it is homogeneous?

    OMP_NUM_THREADS=1 python benchmarks/positions.py         # about 5 minutes on one core

Gaussian fields on 32² points, 16 patches of 8², with and without a mean profile 2 sin(2π y / L) + sin(4π y / L). The best
denoiser of both is known exactly. The figure is the error in excess of it, <|D - W|²> / E_global, by noise level, without (0) and
with (4 modes) Fourier features of the coordinates.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
import torch
from hardware import describe

from ddpatch.config import build
from ddpatch.data.fields import FieldFile
from ddpatch.data.gaussian import PowerLaw, draw
from ddpatch.io.volume import VolumeHeader, write_volume
from ddpatch.model.patches import cut
from ddpatch.parallel.comm import Communicator
from ddpatch.random import Stream, generator
from ddpatch.run import measure_field, resolve
from ddpatch.statistics.oracle import GaussianOracle, noise_level
from ddpatch.training import Training

RESULTS = Path(__file__).parent / "results"
GRID, PATCH, TESTED = (32, 32), (8, 8), 64
LEVELS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
POWER = PowerLaw(2.0, 2.0).power(GRID)


def profile(inhomogeneous: bool) -> torch.Tensor:
    """The mean, with shape ``[*grid]``."""
    phase = 2 * math.pi * torch.arange(GRID[0], dtype=torch.float64) / GRID[0]
    mean = 2 * phase.sin() + (2 * phase).sin()
    return (mean * inhomogeneous)[:, None].expand(GRID)


def train(path: Path, positions: int, steps: int) -> Training:
    """A model on the fields of a file, without shifts of the origin."""
    tree = {
        "domain": {"patch": list(PATCH)},
        "data": {"path": str(path), "shift": False},
        "model": {"channels": [16, 32], "coarse_width": 32, "token_channels": 8, "coarse_layers": 2, "positions": positions},
        "train": {"steps": steps, "batch": 8, "ema": 400.0, "warmup": 20},
    }
    with FieldFile(path) as file:
        config, comm = resolve(build(tree, "benchmark"), file), Communicator()
        training = Training(config, file, measure_field(config, file, comm), comm)
        for _ in range(steps):
            training.advance()
    training.model.load_state_dict(training.average.module.state_dict())
    return training


@torch.no_grad()
def excess(training: Training, mean: torch.Tensor) -> list[float]:
    """Error in excess of the best denoiser's, relative to that one's, at every noise level."""
    oracle, affine, grid = GaussianOracle(POWER), training.field.normalisation, training.decomposition
    offsets, scale = cut(mean[None, None].float(), grid) - affine.mean[0], affine.std[0]
    found = []
    for level, u in enumerate(LEVELS):
        sigma = noise_level(u)
        randoms = (generator(1, Stream.SIMULATION, i, level) for i in range(TESTED))
        distances = oracle.distances(
            lambda x, s: training.denoiser((x + offsets) / scale, s / scale) * scale - offsets, grid, sigma, randoms
        )
        found.append(float(distances.mean()) / oracle.everything(sigma))
    return found


def main() -> None:
    """Train four models, measure, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="training steps (default %(default)s)")
    args = parser.parse_args()
    lines = [
        f"# Positional encoding, {date.today()}",
        "",
        f"{describe()}. `OMP_NUM_THREADS=1 python benchmarks/positions.py --steps {args.steps}`",
        "",
        "Error in excess of the best denoiser's, relative to that one's; one seed each.",
        "",
        "| field | positions | " + " | ".join(f"u = {u:g}" for u in LEVELS) + " |",
        "|---|---|" + "---|" * len(LEVELS),
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, inhomogeneous in (("homogeneous", False), ("mean profile along y", True)):
            path, mean = Path(folder) / f"{inhomogeneous}.h5", profile(inhomogeneous)
            fields = ((draw(POWER, generator(0, Stream.SIMULATION, i)) + mean)[None].numpy() for i in range(2048))
            write_volume(path, VolumeHeader(2048, ("u",), GRID, (1.0, 1.0), (True, True)), (f.astype(np.float32) for f in fields))
            for positions in (0, 4):
                cells = " | ".join(f"{value:.4f}" for value in excess(train(path, positions, args.steps), mean))
                lines.append(f"| {name} | {positions} | {cells} |")
                print(lines[-1], flush=True)
    (RESULTS / f"positions_{os.uname().machine}_{date.today()}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
