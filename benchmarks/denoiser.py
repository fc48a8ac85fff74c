"""Error of trained denoisers by noise level relative to the exact linear denoiser of the field; with and without whitening.

    bash jobs/demo.sh && python benchmarks/denoiser.py --data demo/data.h5        # about 6 minutes on two cores after the demo

The Wiener filter with the data's isotropic spectrum, and with the projection to solenoidal fields, is the best linear denoiser. A
ratio of 1 is its error; a model that uses more than second moments can be below. The report goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from datetime import date
from pathlib import Path

import torch
from hardware import describe
from launch import launch
from torch import Tensor

from ddpatch.data.fields import FieldFile
from ddpatch.model.patches import cut
from ddpatch.parallel.comm import Communicator
from ddpatch.sample import Sampler

RESULTS = Path(__file__).parent / "results"
SIGMAS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 100.0)
TESTED = 8


class Wiener:
    """The exact linear denoiser of isotropic solenoidal fields with the spectrum of some samples.

    Arguments:
        fields: Normalised velocities u, v, w, with shape ``[sample, 3, z, y, x]``.
    """

    def __init__(self, fields: Tensor) -> None:
        k = torch.fft.fftfreq(fields.shape[-1], dtype=torch.float64) * fields.shape[-1]
        self.k = torch.stack(torch.meshgrid(k, k, k, indexing="ij")).flip(0)
        self.square = self.k.square().sum(0).clamp(min=1)
        shell = self.square.sqrt().round().long()
        power = torch.fft.fftn(fields.double(), dim=(2, 3, 4), norm="ortho").abs().square().mean((0, 1))
        mean = torch.bincount(shell.flatten(), power.flatten()) / torch.bincount(shell.flatten()).clamp(min=1)
        self.power = 1.5 * mean[shell]  # three components share the energy of two

    def __call__(self, noisy: Tensor, sigma: float) -> Tensor:
        """Denoise ``[sample, 3, z, y, x]``."""
        modes = torch.fft.fftn(noisy.double(), dim=(2, 3, 4), norm="ortho")
        modes = modes - self.k * (modes * self.k).sum(1, keepdim=True) / self.square
        return torch.fft.ifftn(modes * self.power / (self.power + sigma**2), dim=(2, 3, 4), norm="ortho").real


def ratios(run: Path, data: Path) -> list[float]:
    """Squared error of the run's averaged model over that of the Wiener filter, for every noise level."""
    sampler = Sampler(run, Communicator())
    grid, scale = sampler.decomposition, sampler.field.normalisation.std[0]
    with FieldFile(data) as file:
        fields = (
            torch.stack([torch.from_numpy(file.read(i, (0, 0, 0), grid.grid_shape)) for i in range(file.header.samples)]) / scale
        )
    wiener, clean, found = Wiener(fields), fields[-TESTED:], []
    for sigma in SIGMAS:
        noisy = clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            denoised = sampler.denoise(cut(noisy, grid), torch.full((TESTED,), sigma, dtype=torch.float64))
        error = denoised - cut(clean, grid)
        found.append(float(error.square().sum() / (wiener(noisy, sigma) - clean).square().sum()))
    return found


def train(folder: Path, data: Path, steps: int, whiten: bool) -> Path:
    """Train the demo's model on two ranks."""
    command = ["-m", "ddpatch", "train", "configs/demo.yaml", "--run", str(folder)]
    for key, value in {"data.path": data, "train.steps": steps, "model.whiten": str(whiten).lower()}.items():
        command += ["--set", f"{key}={value}"]
    launch(2, *command)
    return folder


def main() -> None:
    """Train both, measure, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the demo's training data")
    parser.add_argument("--steps", type=int, default=250, help="training steps (default %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: train(Path(folder) / name, args.data, args.steps, name == "whitened") for name in ("plain", "whitened")}
        columns = {name: ratios(run, args.data) for name, run in runs.items()}
    lines = [
        f"# Denoiser error relative to the Wiener filter, {date.today()}",
        "",
        f"{describe()}. `python benchmarks/denoiser.py --data {args.data} --steps {args.steps}`",
        "",
        f"configs/demo.yaml after {args.steps} steps on 2 ranks, with and without whitened stencils, one seed each;",
        f"isotropic turbulence on 32³ points, 8 patches of 16³; {TESTED} samples, which were trained on.",
        "",
        "| σ | plain | whitened |",
        "|---|---|---|",
        *(f"| {s:g} | {a:.2f} | {b:.2f} |" for s, a, b in zip(SIGMAS, columns["plain"], columns["whitened"], strict=True)),
    ]
    text = "\n".join(lines) + "\n"
    (RESULTS / f"denoiser_{platform.machine()}_{date.today()}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
