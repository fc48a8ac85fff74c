"""Solvers of the probability-flow ODE dx/dσ = (x - D(x; σ)) / σ, from noise at σ_max to a sample at σ = 0.

All linear combinations are pointwise, so that a solver runs on patches as on whole fields.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ddpatch.diffusion.level_scale import EXACT, LevelScale
from ddpatch.diffusion.schedule import log_snr
from ddpatch.errors import UserError, nearest

Denoise = Callable[[Tensor, Tensor], Tensor]


class Solver(ABC):
    """One ODE solver. A subclass implements :meth:`step`; state from earlier steps is reset by :meth:`start`.

    Arguments:
        denoise: D(x, σ), with shapes ``[sample, *]`` and ``[sample]``.
        level_scale: What the denoiser is told of the noise level.
    """

    name: str
    evaluations_per_step: int

    def __init__(self, denoise: Denoise, level_scale: LevelScale = EXACT) -> None:
        self._denoise, self._level_scale = denoise, level_scale
        self.evaluations = 0

    @abstractmethod
    def start(self) -> None:
        """Forget earlier steps."""

    @abstractmethod
    def step(self, x: Tensor, sigma: float, target: float) -> Tensor:
        """Advance x, with shape ``[sample, *]``, from noise level ``sigma`` to ``target`` < ``sigma``."""

    def solve(self, noise: Tensor, sigmas: Tensor) -> Tensor:
        """Turn unit noise ``[sample, *]`` into samples along descending noise levels ``[step + 1]``."""
        x = noise * float(sigmas[0])
        for state in self.trajectory(x, sigmas):
            x = state
        return x

    def trajectory(self, x: Tensor, sigmas: Tensor) -> Iterator[Tensor]:
        """Iterate over the states after each step, from x at noise level ``sigmas[0]``."""
        self.start()
        for sigma, target in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
            x = self.step(x, sigma, target)
            yield x

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        """D(x; σ) at one noise level for all samples, counted."""
        self.evaluations += 1
        return self._denoise(x, torch.full((len(x),), self._level_scale.told(sigma), dtype=torch.float64, device=x.device))


class Heun(Solver):
    """Explicit trapezoidal rule in σ, Euler for the last step to 0: order 2, two evaluations per step (EDM, algorithm 1)."""

    name = "heun"
    evaluations_per_step = 2

    def start(self) -> None:
        """Nothing to forget: a one-step method."""

    def step(self, x: Tensor, sigma: float, target: float) -> Tensor:
        """Advance by Euler, then correct with the slope at the end."""
        slope = (x - self.denoise(x, sigma)) / sigma
        euler = x + (target - sigma) * slope
        if target == 0:
            return euler
        end = (euler - self.denoise(euler, target)) / target
        return x + (target - sigma) * (slope + end) / 2


class DPMSolverPP2M(Solver):
    """DPM-Solver++(2M): linear multistep in λ = -ln σ for the data prediction, order 2, one evaluation per step.

        x_t = (σ_t / σ_s) x_s - (e^-h - 1) (D_s + (D_s - D_r) / (2 r)),   h = λ_t - λ_s,   r = (λ_s - λ_r) / h,

    with D_r from the step before; the first step and the last one, to σ = 0, are of order 1. Lu et al., arXiv 2211.01095.
    """

    name = "dpm++2m"
    evaluations_per_step = 1

    def start(self) -> None:
        """Forget the previous prediction."""
        self._previous: tuple[float, Tensor] | None = None

    def step(self, x: Tensor, sigma: float, target: float) -> Tensor:
        """Advance with the slope of the two latest data predictions."""
        data, here = self.denoise(x, sigma), log_snr(sigma)
        slope = data
        if self._previous is not None and target > 0:
            ratio = (here - self._previous[0]) / (log_snr(target) - here)
            slope = torch.lerp(self._previous[1], data, 1 + 1 / (2 * ratio))
        self._previous = (here, data)
        return ((target / sigma) * x).sub_(slope, alpha=math.expm1(here - log_snr(target)))


SOLVERS: dict[str, type[Solver]] = {solver.name: solver for solver in (Heun, DPMSolverPP2M)}


def make_solver(name: str, denoise: Denoise, level_scale: LevelScale = EXACT) -> Solver:
    """The solver of that name.

    Raises:
        UserError: for an unknown name.
    """
    if name not in SOLVERS:
        raise UserError(f"solver: expected one of {', '.join(SOLVERS)}, got '{name}'{nearest(name, SOLVERS)}")
    return SOLVERS[name](denoise, level_scale)
