"""How near to the global optimum is the network before its first training step: its linear part, alone?

    python benchmarks/linear.py

Periodic Gaussian fields of spectrum (1 + (k/2)²)^-p, as in coupling.py, whose moments are taken exactly. Nothing is drawn: the
share of the gap between the patch-alone and the global optimum follows from the factor g(σ), which tests/test_wiener.py compares
with measured errors, and from the exact bounds. ``stencil``: without the coarse level.
"""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path

import torch
from hardware import describe
from torch import Tensor

from ddpatch.data.gaussian import PowerLaw
from ddpatch.model.wiener import LinearPart
from ddpatch.statistics.oracle import GaussianOracle, noise_level

RESULTS = Path(__file__).parent / "results"
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9)
TOKENS = 4
FLAT, SOLID = ((64, 64), (16, 16), 2.0), ((32,) * 3, (16,) * 3, 3.0)
CASES = [(*FLAT, 2), (*FLAT, 4), (*SOLID, 2), (*SOLID, 4)]


def moments(power: Tensor, halo: int, waves: int) -> tuple[Tensor, Tensor]:
    """Covariance by displacement up to 2 δ, and power of the lowest waves, of one channel."""
    dims, lag = tuple(range(power.ndim)), 2 * halo
    lags = torch.fft.ifftn(power).real.roll((lag,) * power.ndim, dims)[(slice(2 * lag + 1),) * power.ndim]
    low = power.roll((waves,) * (power.ndim - 1), dims[:-1])[(*(slice(2 * waves + 1),) * (power.ndim - 1), slice(waves + 1))]
    return lags[None, None], torch.view_as_real(low.to(torch.complex128))[None, None]


def share(grid: tuple[int, ...], patch: tuple[int, ...], exponent: float, halo: int, coarse: bool) -> list[float]:
    """The share of the gap that the linear part closes, by noise level."""
    power = PowerLaw(2.0, exponent).power(grid)
    oracle, cell = GaussianOracle(power), [n // TOKENS for n in patch]
    lags, low = moments(power, halo, grid[0] // cell[0] // 2)
    linear, shares = LinearPart((halo,) * len(grid), lags, low, grid, cell if coarse else None), []
    for sigma in map(noise_level, LEVELS):
        error = float(linear.scale(torch.tensor([sigma], dtype=torch.float64))) ** 2 * sigma**2 / (1 + sigma**2)
        alone, best = oracle.patch(patch, sigma), oracle.everything(sigma)
        shares.append((alone - error) / (alone - best))
    return shares


def main() -> None:
    """Print the table and write it."""
    lines = [f"# The linear part alone, {date.today()}", "", f"{describe()}. `python benchmarks/linear.py`", ""]
    lines += [f"| grid | halo | | {' | '.join(f'u = {u}' for u in LEVELS)} |", "|---" * (3 + len(LEVELS)) + "|"]
    for grid, patch, exponent, halo in CASES:
        for name, coarse in (("stencil", False), ("both levels", True)):
            cells = " | ".join(f"{value:.3f}" for value in share(grid, patch, exponent, halo, coarse))
            lines.append(f"| {'×'.join(map(str, grid))} | {halo} | {name} | {cells} |")
            print(lines[-1], flush=True)
    (RESULTS / f"linear_{os.uname().machine}_{date.today()}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
