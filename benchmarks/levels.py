"""Which noise levels a solver should visit: what their number and spacing cost in energy, computed exactly.

    python benchmarks/levels.py      # seconds

The denoiser of a Gaussian field multiplies every Fourier mode by s_k² / (s_k² + σ²), s_k being the deviation of its shell k, so
that the solver on a mode is a product of numbers and |ln(E_out / E)| of a shell is known without drawing anything. Spectra are
power laws up to a third of the points of the grid; levels are those of ``Schedule.steps``, equal steps of ln σ, and those of EDM,
equal steps of σ^(1/7), from 8 max s_k down to a multiple of min s_k, and then 0. The report goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import date
from typing import Any

import torch
from reports import command, stem, table, write_rows
from torch import Tensor

from ddpatch.diffusion.schedule import MIN_FACTOR, Schedule, sigma_range
from ddpatch.diffusion.solvers import make_solver

SPECTRA = {  # what: (axes, p of E(k) ~ k^-p, points per axis)
    "turbulence, 32³": (3, 5 / 3, 32),
    "turbulence, 128³": (3, 5 / 3, 128),
    "turbulence, 1024³": (3, 5 / 3, 1024),
    "enstrophy cascade, 64²": (2, 3.0, 64),
    "enstrophy cascade, 512²": (2, 3.0, 512),
}
LEAST = (0.3, 0.15, 0.075)  # σ_min / min s_k
EXPONENT = 7
Row = dict[str, Any]
Levels = Callable[[float, float, int], Tensor]


def even(low: float, high: float, count: int) -> Tensor:
    """Those of a sampler."""
    return Schedule(low, high).steps(count)


def edm(low: float, high: float, count: int) -> Tensor:
    """σ_i = (σ_max^(1/ρ) + i/(N-1) (σ_min^(1/ρ) - σ_max^(1/ρ)))^ρ with ρ = 7."""
    levels = torch.linspace(high ** (1 / EXPONENT), low ** (1 / EXPONENT), count, dtype=torch.float64) ** EXPONENT
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


WAYS: dict[str, Levels] = {"EDM": edm, "equal steps of ln σ": even}


def deviations(axes: int, exponent: float, points: int) -> Tensor:
    """s_k of the resolved shells k = 1, 2, ..., up to a factor: E(k) ~ k^(axes - 1) s_k²."""
    shells = torch.arange(1, points // 3 + 1, dtype=torch.float64)
    return shells ** (-(exponent + axes - 1) / 2)


def energy_errors(deviation: Tensor, sigmas: Tensor, solver: str) -> Tensor:
    """|ln(E_out / E)| of every shell."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return x * deviation**2 / (deviation**2 + sigma[:, None] ** 2)

    sample = make_solver(solver, denoise).solve(torch.ones_like(deviation)[None], sigmas)[0]
    return (2 * (sample / deviation).abs().log()).abs()


def measure(counts: list[int], solver: str) -> list[Row]:
    """A row for every spectrum, way and smallest level."""
    return [
        {"spectrum": spectrum, "levels": way, "least": least, **errors(shape, WAYS[way], least, counts, solver)}
        for spectrum, shape in SPECTRA.items()
        for way in WAYS
        for least in LEAST
    ]


def errors(shape: tuple[int, float, int], levels: Levels, least: float, counts: list[int], solver: str) -> Row:
    """The mean over the shells, and the largest, for every number of steps."""
    deviation = deviations(*shape)
    found: Row = {}
    low, high = sigma_range(torch.cat([torch.zeros(1), deviation]), len(deviation))
    for n in counts:
        error = energy_errors(deviation, levels(low * least / MIN_FACTOR, high, n), solver)
        found |= {f"mean {n}": float(error.mean()), f"max {n}": float(error.max())}
    return found


def report(rows: list[Row], counts: list[int], solver: str) -> str:
    """The Markdown page."""
    titles = ("spectrum", "levels", "σ_min / min s_k", *(f"{n} steps" for n in counts))
    cells = [
        [row["spectrum"], row["levels"], row["least"], *(f"{row[f'mean {n}']:.3f} ({row[f'max {n}']:.3f})" for n in counts)]
        for row in rows
    ]
    return "\n".join(
        [
            f"# Noise levels of a solver, {date.today()}",
            "",
            f"Computed exactly. `{command()}`",
            "",
            f"|ln(E_out / E)| of samples of the linear denoiser: mean over the shells, in brackets the largest; solver {solver}.",
            "",
            *table(titles, cells),
        ]
    )


def main() -> None:
    """Compute and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 40, 80], help="of the solver (default 10 20 40 80)")
    parser.add_argument("--solver", default="dpm++2m", help="its name (default %(default)s)")
    args = parser.parse_args()
    rows, path = measure(args.steps, args.solver), stem("levels")
    write_rows(path.with_suffix(".csv"), rows)
    path.with_suffix(".md").write_text(report(rows, args.steps, args.solver))
    print(report(rows, args.steps, args.solver))


if __name__ == "__main__":
    main()
