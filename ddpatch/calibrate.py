"""The verb ``calibrate``: the scale of noise levels with which the samples of a run have the spectrum of its training data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpatch.calibration import CALIBRATION, SCALE, keep
from ddpatch.control import Mean, controlled_mean, gaussian_energies
from ddpatch.data.fields import FieldFile
from ddpatch.diffusion.level_scale import LevelScale
from ddpatch.diffusion.schedule import MAX_FACTOR, MIN_FACTOR, ROUND_OFF, Schedule
from ddpatch.errors import UserError
from ddpatch.parallel.comm import Communicator
from ddpatch.run import Field
from ddpatch.sample import Sampler, sample
from ddpatch.statistics.spectrum import mode_deviation

SEED = 0  # of the noise
KNOTS = 5  # values of λ
TRIAL = 0.05  # by which each of them is raised in turn
FEWEST, PAIRED = 8, 4  # samples that tell m at λ = 1, and what raising does to it
SHELL, SLOPE = 0.01, 0.1  # what a shell may be off by besides chance, and by how much of itself: derivatives are not exact
SPREAD, LOWEST, MOST = 0.1, 0.5, 2.0  # how far values of λ may be from their mean, and their bounds
LEAST = 0.8  # mean of the values


class Excess(NamedTuple):
    """m of some samples.

    Attributes:
        values, errors: m_k of the resolved shells and their standard errors, ``[shell]``.
        mean: The mean over the shells, whose error is not that of independent ones.
    """

    values: Tensor
    errors: Tensor
    mean: Mean


def calibrate(
    folder: Path,
    comm: Communicator,
    count: int = 64,
    solver: str | None = None,
    steps: int | None = None,
    overrides: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Find λ(σ) with which samples have the spectrum of the training data, and keep it in the folder of the run. Collective.

        m_k(λ) = ln(E_k(λ) / E_k),   λ = argmin Σ_k m_k(λ)² / ε_k² + Σ_j (λ_j - mean λ)² / 0.1²,   0.5 ≤ λ_j ≤ 2,

    with E_k of the training data, over the resolved shells (a third of the points per axis), and λ_j the values of λ at five
    noise levels, at equal steps of ln σ from half of the smallest shell's deviation to the largest. ε_k² = e_k² + (0.01 + 0.1
    abs(m_k))², with m_k and its standard error e_k where the step begins: shells that are far off, as of networks that do not
    see the largest ones, are not to be mended at the expense of all others.
    A sixteenth of the samples, 8 or more, give m at λ = 1, half of these, from the same noise, its derivatives, and so a first λ;
    all of them give m there, and a Gauss-Newton step with those derivatives the λ that is kept. The data's spectrum is that in
    the checkpoint: no reference is seen. Of the chance in m, what Gaussian fields from the same noise have of it is taken out
    (:mod:`ddpatch.control`).

    Arguments:
        folder: Of the run; its newest checkpoint is calibrated.
        comm: The ranks that share every sample.
        count: Samples of the last trial.
        solver, steps: As for :func:`ddpatch.sample.sample`.
        overrides: As for :class:`ddpatch.sample.Sampler`.
        progress: Called on every rank with the solver steps done and to do.

    Returns:
        What is kept: the sampler's ``setting``; ``level_scale``; the standard ``error`` of its mean, that of so many samples;
        ``energy``, the mean over the shells of m at λ = 1; and ``spectrum``, the means of abs(m_k) there and where it is kept,
        all by those derivatives.

    Raises:
        UserError: if there are fewer than 2 samples, if they are not finite, or if they have energies that no λ mends whose mean
            is from 0.8 to 2.
    """
    if count < 2:
        raise UserError(f"--count {count}: expected at least 2 samples")
    sampler = Sampler(folder, comm, overrides=overrides)
    settings, levels = sampler.config.sample, knots(sampler.field.schedule)
    solver, steps = solver or settings.solver, steps or settings.steps
    few = min(count, max(FEWEST, -(-count // 16)))
    paired = min(count, max(PAIRED, few // 2))
    trials = Trials(sampler, solver, steps, levels, [few, *[paired] * KNOTS, count], progress)
    ones = torch.ones(KNOTS, dtype=torch.float64)
    exact = trials.draw(ones)
    raised = [trials.draw(ones + TRIAL * one) for one in torch.eye(KNOTS, dtype=torch.float64)]
    slopes = torch.stack([(found.mean(0) / exact[:paired].mean(0)).log() / TRIAL for found in raised], dim=1)
    start, slope = excess(exact, sampler), float(slopes.sum(1).mean())
    first = fit(start, slopes, ones)
    check_mendable(first, slope, start.values, folder)  # before the samples that cost most
    last = excess(trials.draw(first), sampler)
    scale = fit(last, slopes, first)
    before, after = (last.values + slopes @ (values - first) for values in (ones, scale))
    check_mendable(scale, slope, before, folder)
    kept = {
        **sampler.setting(solver, steps),
        SCALE: LevelScale(tuple(scale.tolist()), levels),
        "error": last.mean.error / abs(slope),
        "energy": float(before.mean()),
        "spectrum": [float(m.abs().mean()) for m in (before, after)],
    }
    comm.on_root(lambda: keep(folder / CALIBRATION, kept))
    return kept


def check_mendable(values: Tensor, slope: float, exact: Tensor, folder: Path) -> None:
    """Refuse values of λ, found with this mean derivative of m, that cannot mend the m which samples have at λ = 1."""
    if not (slope and LEAST <= float(values.mean()) < MOST):
        raise UserError(
            f"{folder}: the energy of samples is off by {float(exact.mean()):+.2f} (logarithm), expected what a noise scale "
            f"from {LEAST} to {MOST} mends, not {float(values.mean()):.3g}; train longer"
        )


@dataclass
class Trials:
    """Samples of a run from the same noise, at one λ after the other.

    Arguments:
        sampler: Of the run.
        solver, steps: As for :func:`ddpatch.sample.sample`.
        levels: Noise levels at which λ has values.
        counts: Samples of every trial.
        progress: Called on every rank with the solver steps done and to do.
        drawn: Trials so far.
    """

    sampler: Sampler
    solver: str
    steps: int
    levels: tuple[float, ...]
    counts: Sequence[int]
    progress: Callable[[int, int], None]
    drawn: int = 0

    def draw(self, values: Tensor) -> Tensor:
        """The energies of the next trial in all shells that the data hold, with shape ``[sample, shell]``. Collective."""
        folder, comm, field = self.sampler.folder, self.sampler.comm, self.sampler.field
        path, scale = folder / f".calibration-{self.drawn}.h5", LevelScale(tuple(values.tolist()), self.levels)
        how: dict[str, Any] = {"seed": SEED, "mode": "gather", "overwrite": True, "level_scale": scale}
        sample(self.sampler, path, self.counts[self.drawn], self.solver, self.steps, progress=self._report, **how)
        found = shell_energies(path, field, comm)
        comm.on_root(lambda: _remove(path))
        self.drawn += 1
        found = found[:, held(field, found.shape[1])]
        if not (found.isfinite().all() and (found.mean(0) > 0).all()):
            raise UserError(f"{folder}: samples are not finite numbers, expected fields; train longer")
        return found

    def _report(self, done: int, _: int) -> None:
        todo = [self.steps * -(-samples // self.sampler.batch) for samples in self.counts]
        self.progress(sum(todo[: self.drawn]) + done, sum(todo))


def held(field: Field, shells: int) -> Tensor:
    """Numbers, from 0 for wave number 1, of the shells of which single-precision data hold more than round-off."""
    deviation = torch.tensor(field.spectrum[0], dtype=torch.float64)[1 : shells + 1]
    return (deviation > ROUND_OFF * max(field.spectrum[0])).nonzero()[:, 0]


def knots(schedule: Schedule) -> tuple[float, ...]:
    """The noise levels at which λ has values of its own: between the smallest shell and the largest, where shells emerge."""
    low, high = schedule.sigma_min / (2 * MIN_FACTOR), schedule.sigma_max / MAX_FACTOR
    return tuple(np.geomspace(low, max(low, high), KNOTS).tolist())


def fit(found: Excess, slopes: Tensor, values: Tensor) -> Tensor:
    """A Gauss-Newton step from some values of λ: least squares within bounds, held together by how far values may be from their
    mean.

    Arguments:
        found: m at these values.
        slopes: Derivatives of m_k, with shape ``[shell, value]``.
        values: λ_j, with shape ``[value]``.
    """
    weights = 1 / (found.errors.square() + (SHELL + SLOPE * found.values.abs()).square()).sqrt()
    apart = (torch.eye(len(values), dtype=values.dtype) - 1 / len(values)) / SPREAD
    left = torch.cat([weights[:, None] * slopes, apart])
    right = torch.cat([weights * (slopes @ values - found.values), torch.zeros_like(values)])
    best, free = values.clone(), torch.ones_like(values, dtype=torch.bool)
    while free.any():  # what comes out of bounds stays there
        best[free] = torch.linalg.lstsq(left[:, free], right - left[:, ~free] @ best[~free]).solution
        inside = (best >= LOWEST) & (best <= MOST)
        best, free = best.clamp(LOWEST, MOST), free & inside
        if inside.all():
            break
    return best


def excess(energies: Tensor, sampler: Sampler) -> Excess:
    """m of the first samples of the series, from their energies (:meth:`Trials.draw`). Collective."""
    field, last = sampler.field, min(sampler.decomposition.grid_shape) // 3
    known = gaussian_energies(field, sampler.decomposition, range(len(energies)), SEED, last, sampler.comm)[:, held(field, last)]
    relative, logs = energies / energies.mean(0), energies.mean(0).log() - 1
    chance = [controlled_mean(y, z) for y, z in zip(relative.T, known.T, strict=True)]
    of_all = controlled_mean(relative.mean(1), known.mean(1))
    values, errors = torch.tensor(chance, dtype=torch.float64).T
    return Excess(values + logs, errors, Mean(of_all.value + float(logs.mean()), of_all.error))


def shell_energies(path: Path, field: Field, comm: Communicator) -> Tensor:
    """E(k) / E(k) of the training data for every sample and resolved shell, with shape ``[sample, shell]``. Collective."""
    mean, std = np.asarray(field.normalisation.mean), np.asarray(field.normalisation.std)
    with FieldFile(path) as file:
        samples, last = range(file.header.samples), min(file.header.grid_shape) // 3
        deviations = torch.stack([mode_deviation(file, [k], comm, None, mean, std).deviation for k in samples])
    return (deviations[:, 1 : last + 1] / torch.tensor(field.spectrum[0], dtype=torch.float64)[1 : last + 1]).square()


def _remove(path: Path) -> None:
    for each in (path, path.with_suffix(".xdmf")):
        each.unlink(missing_ok=True)
