"""How far do couplings reach? The two-disc task of DDU-Net: draw the line between two discs that lie in different patches.

    python benchmarks/discs.py                # all couplings, two at a time

An image is a row of 8 patches of 32 × 32 points with a disc of radius 4 in each of two patches. Every point is to be classified
as background, line (3 points wide, between the centres) or disc. A patch that knows of itself only cannot know where the line
goes. The figure is the intersection over union of the line, by the distance of the discs' patches. Verburg, Heinlein, Cyr, IEEE
Access 13, 2025; the convolutional communicator is theirs (three layers, kernel 5): it reaches 6 tokens, one and a half patches.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from hardware import describe
from torch import Tensor

from ddpatch.config import ModelConfig
from ddpatch.couplings import COUPLINGS
from ddpatch.decomposition import Decomposition
from ddpatch.model.coupling import Coupling, OwnPatch
from ddpatch.model.two_level import TwoLevelModel, count_parameters
from ddpatch.optimiser import Muon
from ddpatch.parallel.collectives import Exchange
from ddpatch.parallel.comm import Communicator
from ddpatch.training import learning_rate

RESULTS = Path(__file__).parent / "results"
SIDE, PATCHES, RADIUS, HALF_WIDTH = 32, 8, 4.0, 1.5
BACKGROUND, LINE, DISC = range(3)
WIDTHS = {"channels": (8, 16, 32, 32), "token_channels": 32, "coarse_width": 64, "coarse_layers": 4, "halo": 2}
TESTED = 1024


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images with discs of value 1 and classes, both ``[image, y, x]``, and distances of the discs' patches ``[image]``."""
    first = torch.randint(PATCHES, (count,), generator=generator)
    second = (first + torch.randint(1, PATCHES, (count,), generator=generator)) % PATCHES
    inside = torch.rand(count, 2, 2, generator=generator) * (SIDE - 2 * RADIUS) + RADIUS
    centres = inside + torch.stack([torch.zeros(count, 2), torch.stack([first, second], 1) * SIDE], dim=2)
    y, x = torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE * PATCHES) + 0.5, indexing="ij")
    points = torch.stack([y, x], dim=-1)[None]
    a, b = (centres[:, i, None, None] for i in (0, 1))
    along = (((points - a) * (b - a)).sum(-1) / (b - a).square().sum(-1)).clamp(0, 1)[..., None]
    line = (points - a - along * (b - a)).norm(dim=-1) <= HALF_WIDTH
    disc = torch.minimum((points - a).norm(dim=-1), (points - b).norm(dim=-1)) <= RADIUS
    classes = torch.where(disc, DISC, torch.where(line, LINE, BACKGROUND))
    return disc.float(), classes, (first - second).abs()


class Segmenter(torch.nn.Module):
    """The two-level network as a classifier of points: the image in three channels, a score per class out."""

    def __init__(self, coupling: str) -> None:
        super().__init__()
        config = ModelConfig(coupling=coupling, **WIDTHS)  # type: ignore[arg-type]
        self.alone = config.paths.alone
        decomposition = Decomposition((SIDE, SIDE * PATCHES), (SIDE, SIDE), 1, (False, False))
        exchange = Exchange(decomposition, Communicator(), config.reach)
        self.exchange: Coupling = OwnPatch((SIDE, SIDE), config.reach) if self.alone else exchange
        self.network = TwoLevelModel(3, 2, config, (False, False))

    def forward(self, images: Tensor) -> Tensor:
        """Map ``[image, y, x]`` to scores ``[image, patch, class, y, x]``."""
        patches = images.unflatten(2, (PATCHES, SIDE)).movedim(2, 1)[:, :, None].expand(-1, -1, 3, -1, -1)
        if self.alone:
            patches = patches.flatten(0, 1)[:, None]
        scores: Tensor = self.network(patches, torch.zeros(len(patches)), self.exchange)
        return scores.reshape(len(images), PATCHES, 3, SIDE, SIDE)


def loss(scores: Tensor, classes: Tensor) -> Tensor:
    """Cross entropy, and one minus the Dice coefficient of the line, which few points belong to."""
    flat = scores.movedim(2, -1).flatten(0, -2)
    wanted = classes.unflatten(2, (PATCHES, SIDE)).movedim(2, 1).flatten()
    line, truth = flat.softmax(-1)[:, LINE], (wanted == LINE).float()
    dice = 1 - 2 * (line * truth).sum() / (line.sum() + truth.sum())
    return F.cross_entropy(flat, wanted) + dice


def train(coupling: str, steps: int, batch: int) -> tuple[Segmenter, float]:
    """Train on images that are never repeated."""
    torch.manual_seed(0)
    generator, start = torch.Generator().manual_seed(1), time.perf_counter()
    model = Segmenter(coupling)
    optimiser = Muon(model.named_parameters(), lr=5e-3, adam=("embed.", "decoder.out.", ".centre"))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: learning_rate(step, steps, steps // 20))
    for step in range(steps):
        images, classes, _ = draw(batch, generator)
        value = loss(model(images), classes)
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 99:
            print(f"{coupling}: step {step + 1}, loss {float(value.detach()):.4f}", file=sys.stderr, flush=True)
    return model, time.perf_counter() - start


@torch.no_grad()
def overlap(model: Segmenter) -> list[float]:
    """Intersection over union of the line, by distance of the discs' patches from 1 to 7."""
    hit, either = torch.zeros(PATCHES), torch.zeros(PATCHES)
    generator = torch.Generator().manual_seed(2)
    for _ in range(TESTED // 32):
        images, classes, distances = draw(32, generator)
        found = model(images).argmax(2).movedim(1, 2).flatten(2) == LINE
        truth = classes == LINE
        hit.index_add_(0, distances, (found & truth).sum((1, 2)).float())
        either.index_add_(0, distances, (found | truth).sum((1, 2)).float())
    return (hit / either.clamp(min=1))[1:].tolist()


def launch(coupling: str, steps: int, batch: int) -> list[str]:
    """One coupling in a process of its own, on one thread; returns its row."""
    command = [sys.executable, __file__, "--worker", coupling, "--steps", str(steps), "--batch", str(batch)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout.split()


def report(rows: list[list[str]], header: list[str], command: str) -> str:
    """The Markdown page."""
    shares = {row[0]: [float(v) for v in row[1:PATCHES]] for row in rows}
    lines = [
        f"# Two discs, {date.today()}",
        "",
        f"{describe()}. `{command}`",
        "",
        f"Model {WIDTHS}, 4 × 4 tokens per patch.",
        f"Intersection over union of the line, by distance of the discs' patches; {TESTED} images, one seed.",
        "",
        "| " + " | ".join(header) + " |",
        "|---" * len(header) + "|",
        *("| " + " | ".join([row[0], *(f"{float(v):.3f}" for v in row[1:PATCHES]), *row[PATCHES:]]) + " |" for row in rows),
        "",
    ]
    if {"two-level", "convolutional"} <= set(shares):
        ahead = [v - c for v, c in zip(shares["two-level"], shares["convolutional"], strict=True)][2:]
        lines.append(
            f"From distance 3 on the transformer is ahead of the convolutional communicator by at least {min(ahead):.3f}."
        )
    if {"self-only", "none"} <= set(shares):
        apart = max(abs(a - b) for a, b in zip(shares["self-only"], shares["none"], strict=True))
        lines.append(f"Self-only and none differ by at most {apart:.3f}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train and test, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = [name for name, paths in COUPLINGS.items() if not paths.whole]
    parser.add_argument("--couplings", nargs="+", default=everything, choices=everything)
    parser.add_argument("--steps", type=int, default=600, help="training steps (default %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="images per step (default %(default)s)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        model, seconds = train(args.worker, args.steps, args.batch)
        print(args.worker, *overlap(model), count_parameters(model), round(seconds))
        return
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        rows = list(pool.map(lambda coupling: launch(coupling, args.steps, args.batch), args.couplings))
    header = ["coupling", *map(str, range(1, PATCHES)), "parameters", "s"]
    stem = RESULTS / f"discs_{os.uname().machine}_{date.today()}"
    with stem.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    options = f"--couplings {' '.join(args.couplings)} --steps {args.steps} --batch {args.batch}"
    text = report(rows, header, f"python benchmarks/discs.py {options}")
    stem.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
