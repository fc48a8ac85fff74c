"""The verb ``calibrate``: the scale of noise levels with which the samples of a run have the energy of its training data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpatch.calibration import CALIBRATION, SCALE, keep
from ddpatch.control import Mean, controlled_mean, gaussian_energies
from ddpatch.data.fields import FieldFile
from ddpatch.errors import UserError
from ddpatch.parallel.comm import Communicator
from ddpatch.run import Field
from ddpatch.sample import Sampler, sample
from ddpatch.statistics.spectrum import mode_deviation

SEED = 0  # of the noise
TRIAL = 1.05
FEWEST = 8  # samples that tell a slope
LEAST, MOST = 0.9, 2.0


def calibrate(
    folder: Path,
    comm: Communicator,
    count: int = 64,
    solver: str | None = None,
    steps: int | None = None,
    overrides: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Find λ with which nothing is missing from the energy of samples, and keep it in the folder of the run. Collective.

        m(λ) = mean over shells k of ln(E_λ(k) / E(k)),   m(λ*) = 0,

    with E of the training data, over the resolved shells (a third of the points per axis). An eighth of the samples, 8 or more,
    with the same noise for both, give the slope of m between λ = 1 and 1.05, and a first λ; all of them give m there, and a
    Newton step with that slope the λ that is kept. The data's spectrum is that in the checkpoint: no reference is seen. Of the
    chance in m, what Gaussian fields from the same noise have of it is taken out (:mod:`ddpatch.control`).

    Arguments:
        folder: Of the run; its newest checkpoint is calibrated.
        comm: The ranks that share every sample.
        count: Samples of the last trial.
        solver, steps, overrides: As for :func:`ddpatch.sample.sample`.
        progress: Called on every rank with the solver steps done and to do.

    Returns:
        What is kept: the sampler's ``setting``; ``level_scale`` and its standard ``error``, that of so many samples; and
        ``energy``, which is m(1) by that slope.

    Raises:
        UserError: if there are fewer than 2 samples, or if they have energies that no scale from 0.9 to 2 mends.
    """
    if count < 2:
        raise UserError(f"--count {count}: expected at least 2 samples")
    sampler = Sampler(folder, comm, overrides=overrides)
    settings = sampler.config.sample
    solver, steps = solver or settings.solver, steps or settings.steps

    few = min(count, max(FEWEST, -(-count // 8)))
    todo = [steps * -(-samples // sampler.batch) for samples in (few, few, count)]

    def energy(trial: int, scale: float) -> Mean:
        def of_all(done: int, _: int) -> None:
            progress(sum(todo[:trial]) + done, sum(todo))

        path, forced = folder / f".calibration-{scale:g}.h5", [*overrides, f"sample.noise_scale={scale}"]
        samples = count if trial == len(todo) - 1 else few
        told: dict[str, Any] = {"seed": SEED, "overrides": forced, "mode": "gather", "overwrite": True, "progress": of_all}
        sample(folder, path, samples, comm, solver, steps, **told)
        found = excess_energy(path, sampler, comm)
        comm.on_root(lambda: _remove(path))
        return found

    first = energy(0, 1.0).value
    slope = (energy(1, TRIAL).value - first) / (TRIAL - 1)
    trial = min(max(1 - first / slope, LEAST), MOST) if slope else MOST
    last = energy(2, trial)
    scale = trial - last.value / slope if slope else math.inf
    if not LEAST <= scale <= MOST:
        raise UserError(
            f"{folder}: the energy of samples is off by {first:+.2f} (logarithm), expected what a noise scale from {LEAST} to "
            f"{MOST} mends, not {scale:.3g}; train longer"
        )
    found = {SCALE: scale, "error": last.error / abs(slope), "energy": (1 - scale) * slope}
    kept = {**sampler.setting(solver, steps), **found}
    comm.on_root(lambda: keep(folder / CALIBRATION, kept))
    return kept


def excess_energy(path: Path, sampler: Sampler, comm: Communicator) -> Mean:
    """m of a file of samples, the mean over the resolved shells of ln(E(k) / E(k) of the training data). Collective."""
    energies = shell_energies(path, sampler.field, comm)
    samples, shells = range(len(energies)), energies.shape[1]
    known = gaussian_energies(sampler.field, sampler.decomposition, samples, SEED, shells, comm)
    chance = controlled_mean((energies / energies.mean(0)).mean(1), known.mean(1))
    return Mean(float(energies.mean(0).log().mean()) + chance.value - 1, chance.error)


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
