"""How much of the chance in a calibration its control variate takes out (ddpatch/control.py), on samples of turbulence.py.

    python benchmarks/chance.py      # after python benchmarks/turbulence.py; on one rank, for the full domain is one patch

y: mean over the resolved shells of a sample's energy, relative to that of all samples. Given are its deviation, the slope β, the
share of the variance that is left, and, as a check of both errors, the deviation of the means of blocks of 16 samples about that
of all, plain and with the control variate, in units of what the errors of such blocks say (1 where they are honest). With as
little chance the largest scales can be seen: ln(E / E of the training data) of shells 1, 2 and 3, each with its control variate.
"""

from __future__ import annotations

import argparse
import math
from datetime import date
from pathlib import Path
from typing import Any

import torch
from flows import SCHEMES, SMALL, samples_of
from hardware import describe
from reports import command, stem, table, write_rows
from torch import Tensor

from ddpatch.calibrate import shell_energies
from ddpatch.control import Mean, controlled_mean, gaussian_energies
from ddpatch.decomposition import Decomposition
from ddpatch.parallel.comm import Communicator
from ddpatch.sample import Sampler

BLOCK = 16
LARGEST = 3  # shells
CALIBRATED = ("full-domain U-Net", "halo", "tokens", "halo and tokens")


def measure(kind: str, scheme: str, folder: Path, comm: Communicator) -> dict[str, Any]:
    """The row of a scheme. Collective."""
    sampler = Sampler(folder / SCHEMES[scheme][0], comm)
    energies = shell_energies(samples_of(scheme, folder), sampler.field, comm)
    count, seed = len(energies), sampler.config.train.seed + 1
    grid = Decomposition(sampler.decomposition.grid_shape, SMALL[kind].patch, comm.size)  # of the noise, in a full domain too
    known = gaussian_energies(sampler.field, grid, range(count), seed, energies.shape[1], comm)
    relative = energies / energies.mean(0)
    y, z = relative.mean(1), known.mean(1)
    slope = float(torch.cov(torch.stack([y, z]))[0, 1] / z.var())
    left = (y - slope * z).var() / y.var()
    plain, controlled = blocks(y, z)
    shells = {f"shell{k + 1}": largest(energies[:, k], known[:, k]) for k in range(LARGEST)}
    return {
        "flow": kind,
        "scheme": scheme,
        "samples": count,
        "deviation": float(y.std()),
        "slope": slope,
        "left": float(left),
        "plain": plain,
        "controlled": controlled,
        **{f"{shell}{part}": value for shell, mean in shells.items() for part, value in zip(("", "_error"), mean, strict=True)},
    }


def largest(energy: Tensor, known: Tensor) -> Mean:
    """ln E of a shell, with its error."""
    found = controlled_mean(energy / energy.mean(), known)
    return Mean(math.log(float(energy.mean())) + found.value - 1, found.error)


def blocks(y: Tensor, z: Tensor) -> tuple[float, float]:
    """Deviations of the means of blocks about that of all, in units of their errors: plain, and with the control variate."""
    pairs = [(y[i : i + BLOCK], z[i : i + BLOCK]) for i in range(0, len(y), BLOCK)]
    means, middle = [controlled_mean(*pair) for pair in pairs], controlled_mean(y, z).value
    plain = torch.stack([(part - y.mean()).mean() / part.std() * math.sqrt(BLOCK) for part, _ in pairs])
    controlled = torch.tensor([(mean.value - middle) / mean.error for mean in means])
    return tuple(float(each.square().mean().sqrt()) for each in (plain, controlled))  # type: ignore[return-value]


def report(rows: list[dict[str, Any]]) -> str:
    """The Markdown page."""
    largest_shells = [f"shell{k + 1}" for k in range(LARGEST)]
    header = ["flow", "scheme", "samples", "deviation of y", "β", "variance left", f"blocks of {BLOCK}: plain", "controlled"]
    header += [f"ln E of shell {k + 1}" for k in range(LARGEST)]
    cells = [
        [
            *(row["flow"], row["scheme"], row["samples"]),
            *(f"{row[key]:.3f}" for key in ("deviation", "slope", "left")),
            *(f"{row[key]:.2f}" for key in ("plain", "controlled")),
            *(f"{row[shell]:+.3f} ± {row[f'{shell}_error']:.3f}" for shell in largest_shells),
        ]
        for row in rows
    ]
    title = f"# The control variate of calibration, {date.today()}"
    return "\n".join([title, "", f"{describe()}. `{command()}`", "", *table(header, cells)])


def main() -> None:
    """Measure all schemes of both flows that were drawn. Collective."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/turbulence/small"), help="of turbulence.py (%(default)s)")
    args = parser.parse_args()
    comm = Communicator()
    rows = [measure(kind, scheme, args.folder / kind, comm) for kind in SMALL for scheme in CALIBRATED]
    write_rows(stem("chance").with_suffix(".csv"), rows)
    stem("chance").with_suffix(".md").write_text(report(rows))


if __name__ == "__main__":
    main()
