"""Sampling: one loop that reads top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpatch import __version__
from ddpatch.calibration import CALIBRATION, scale_for
from ddpatch.config import Config
from ddpatch.diffusion.level_scale import EXACT, LevelScale
from ddpatch.diffusion.solvers import Denoise, make_solver
from ddpatch.errors import Left, UserError
from ddpatch.execution import (
    check_compiler,
    check_groups,
    check_precision,
    compile_fine_level,
    fit_groups,
    keep_freed_memory,
)
from ddpatch.io import checkpoint
from ddpatch.io.seal import read_seal
from ddpatch.io.volume import VolumeHeader
from ddpatch.io.writers import open_writer
from ddpatch.io.xdmf import write_sidecar
from ddpatch.model.coupling import Lag
from ddpatch.model.two_level import Message
from ddpatch.notice import Notice
from ddpatch.parallel.collectives import Exchange
from ddpatch.parallel.comm import Communicator
from ddpatch.parallel.roll import roll
from ddpatch.random import Stream, generator, patch_noise
from ddpatch.run import Field, build_for_sampling, decompose, dtype, make_denoiser, make_model

Progress = Callable[[int], None]


class MovingTiling:
    """The denoiser with the patches' borders somewhere else in every evaluation.

        D_s(x) = R_-s D(R_s x),   (R_s x)(i) = x(i + s),

    with s uniform over a patch, along periodic axes, so that borders do not act on the same points every time.
    For denoisers of independent patches the idea is that of PaDIS (Hu et al., NeurIPS 2024).

    Arguments:
        denoise: D(x, σ) on own patches.
        coupling: The grid, its patches and the ranks that share it.
        seed: Evaluation n has the same shift for all samples of a seed.
    """

    def __init__(self, denoise: Denoise, coupling: Exchange, seed: int) -> None:
        self.denoise, self.coupling, self.seed = denoise, coupling, seed
        self.evaluations = 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Evaluate in the next tiling. Collective."""
        grid, comm = self.coupling.decomposition, self.coupling.comm
        drawn = generator(self.seed, Stream.TILING, self.evaluations).integers(grid.patch_shape).tolist()
        shifts = [s if wraps else 0 for s, wraps in zip(drawn, grid.periodic, strict=True)]
        self.evaluations += 1
        return roll(self.denoise(roll(x, shifts, grid, comm), sigma), [-s for s in shifts], grid, comm)


class Sampler:
    """A trained run, ready to draw samples on a grid.

    Arguments:
        folder: Of the run; its newest checkpoint is taken.
        comm: The ranks that share every sample.
        grid: Points of the samples' grid, a multiple of the patch. Default: the grid of the training.
        overrides: ``section.key=value`` of sample, output, parallel or execution.

    Raises:
        UserError: if there is no readable checkpoint, or grid or overrides do not fit the patches or the ranks.
    """

    def __init__(
        self, folder: Path, comm: Communicator, grid: Sequence[int] | None = None, overrides: Sequence[str] = ()
    ) -> None:
        path, state = checkpoint.load_latest(folder, comm)
        self.config: Config = build_for_sampling(state["config"], str(path), overrides)
        self.field = Field.from_state(state["statistics"], path)
        self.folder, self.samples_seen = folder, int(state["samples_seen"])
        self.checkpoint = f"{path.name}, sha256 {read_seal(path)}"
        parallel = self.config.parallel
        self.comm, self.device = comm, comm.place(parallel.device, parallel.share_device)
        comm.connect(parallel.transport, self.device)
        keep_freed_memory(self.device, self.config.execution.patches_at_once)
        if grid is not None and len(grid) != len(self.config.domain.patch):
            raise UserError(f"--grid {' '.join(map(str, grid))}: the run has {len(self.config.domain.patch)} axes")
        if grid is not None and self.config.model.paths.whole and tuple(grid) != self.config.domain.patch:
            coupling, only = self.config.model.coupling, list(self.config.domain.patch)
            raise UserError(f"--grid {' '.join(map(str, grid))}: a {coupling} model has the grid {only}")
        self.decomposition = decompose(self.config, comm.size, grid)
        if not any(override.startswith("execution.") for override in overrides):
            self.config = fit_groups(self.config, self.decomposition)
        check_groups(self.config, self.decomposition)
        check_precision(self.config, self.device)
        check_compiler(self.config, self.device)
        self.coupling = Exchange(self.decomposition, comm, self.config.model.reach)
        self.model = make_model(self.config, self.field)
        checkpoint.restore_weights(self.model, state["ema"], path)
        compile_fine_level(self.model, self.config.execution)
        self.lag: Lag[Message] | None = Lag() if self.config.sample.lagged else None
        self.denoise = make_denoiser(self.config, self.field, self.model.to(self.device).eval(), self.coupling, self.lag)

    @torch.no_grad()
    def draw(
        self,
        samples: Sequence[int],
        seed: int,
        solver: str,
        steps: int,
        shift: bool = False,
        level_scale: LevelScale = EXACT,
        progress: Progress = lambda done: None,
    ) -> Tensor:
        """Own patches of some samples in physical units. Collective.

        Arguments:
            samples: Global sample numbers; together with ``seed`` they name the noise.
            seed: Of the series.
            solver: Name of the solver.
            steps: Number of solver steps.
            shift: Move the tiling, where :attr:`movable`.
            level_scale: What the denoiser is told of the noise level.
            progress: Called after every step with the number of steps done.

        Returns:
            Shape ``[sample, local patch, channel, *patch_shape]``.
        """
        sigmas = self.field.schedule.steps(steps)
        denoise = MovingTiling(self.denoise, self.coupling, seed) if shift and self.movable else self.denoise
        x = self.noise(samples, seed).to("cpu" if self.config.sample.on_host else self.device).mul_(float(sigmas[0]))
        for done, state in enumerate(make_solver(solver, denoise, level_scale).trajectory(x, sigmas), start=1):
            x = state
            progress(done)
        if self.lag is not None:
            self.lag.end()
        return self.field.normalisation.restore(x)

    def noise(self, samples: Sequence[int], seed: int) -> Tensor:
        """Unit noise on own patches, which samples begin with: shape ``[sample, local patch, channel, *patch_shape]``."""
        shape = (len(self.field.channels), *self.decomposition.patch_shape)
        return patch_noise(shape, seed, Stream.SAMPLE, samples, 0, self.coupling.patches, dtype(self.config))

    @property
    def batch(self) -> int:
        """Samples that are drawn at a time."""
        return self.config.sample.batch or self.config.train.batch

    @property
    def movable(self) -> bool:
        """Whether patches may tile the grid from any origin: it closes on itself, the training drew its origin at random, and
        patches are not told where they are, and what they are told is not of the evaluation before.
        """
        return (
            not self.config.sample.lagged
            and self.config.data.shift
            and self.config.model.positions == 0
            and any(self.decomposition.periodic)
        )

    def setting(self, solver: str, steps: int) -> dict[str, Any]:
        """All that a calibration holds for: checkpoint, solver, number of steps, noise levels, and whether tokens lag."""
        return {
            "checkpoint": self.checkpoint,
            "solver": solver,
            "steps": steps,
            "levels": [float(f"{sigma:.4g}") for sigma in self.field.schedule.steps(steps).tolist()],
            "lagged": self.config.sample.lagged,
        }

    def level_scale(self, solver: str, steps: int) -> LevelScale:
        """That of the configuration, or what calibration found for this :meth:`setting`, or 1. Collective.

        Where calibration was of another setting there is a warning.
        """
        if self.config.sample.noise_scale:
            return LevelScale((self.config.sample.noise_scale,))
        wanted, path = self.setting(solver, steps), self.folder / CALIBRATION
        return self.comm.on_root(lambda: scale_for(wanted, path))

    def header(self, count: int, **provenance: Any) -> VolumeHeader:
        """The header of a file of ``count`` samples."""
        return VolumeHeader(
            count,
            self.field.channels,
            self.decomposition.grid_shape,
            self.field.spacing,
            self.decomposition.periodic,
            attributes={
                "created_by": f"ddpatch {__version__}",
                "patch_shape": list(self.decomposition.patch_shape),
                "ranks": self.comm.size,
                "samples_seen": self.samples_seen,
                "checkpoint": self.checkpoint,
                "config": self.config.as_yaml(),
                **provenance,
            },
        )


def sample(
    sampler: Sampler,
    output: Path,
    count: int,
    solver: str | None = None,
    steps: int | None = None,
    shift: bool | None = None,
    seed: int = 0,
    mode: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    time_limit: float | None = None,
    level_scale: LevelScale | None = None,
) -> None:
    """Draw samples into one file, with an XDMF sidecar. Collective.

    Samples are kept batch by batch: after a failure, or on notice, the same call makes those that are missing.

    Arguments:
        sampler: What draws them.
        output: File of the samples.
        count: Number of samples; sample k depends on ``seed`` and k only.
        solver, steps, shift, mode: Override the configuration of the sampler.
        seed: Of the series.
        overwrite: Replace an existing file.
        progress: Called on every rank with the solver steps done and to do, all samples together.
        time_limit: Seconds after which to leave.
        level_scale: What the denoiser is told of the noise level. Default: :meth:`Sampler.level_scale`.

    Raises:
        Left: on all ranks, after a signal to one of them or at the end of the time, when a batch is on the disk.
        UserError: if count or output do not fit.
    """
    if count < 1:
        raise UserError(f"--count {count}: expected at least 1 sample")
    comm, defaults = sampler.comm, sampler.config.sample
    solver, steps = solver or defaults.solver, steps or defaults.steps
    shift = (defaults.shift if shift is None else shift) and sampler.movable
    batch, total = sampler.batch, -(-count // sampler.batch) * steps
    scale = level_scale or sampler.level_scale(solver, steps)
    told = {"noise_scale": list(scale.values), "noise_scale_levels": list(scale.levels)}
    header = sampler.header(count, seed=seed, solver=solver, steps=steps, shift=shift, **told)
    mode = mode or sampler.config.output.mode
    with Notice(time_limit) as notice, open_writer(output, header, sampler.decomposition, comm, mode, overwrite) as writer:
        for start in range(0, count, batch):
            numbers, before = range(start, min(start + batch, count)), start // batch * steps
            if writer.finished.issuperset(numbers):
                continue
            drawn = sampler.draw(numbers, seed, solver, steps, shift, scale, partial(_report, progress, before, total))
            for number, patches in zip(numbers, drawn, strict=True):
                writer.write(number, patches.to("cpu", torch.float32))
            writer.commit()
            if comm.union(notice.given()) and len(writer.finished) < count:
                raise Left(f"left on notice with {len(writer.finished)} of {count} samples; the same command goes on from there")
    comm.on_root(lambda: write_sidecar(output, header, overwrite=True))


def _report(progress: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    progress(before + done, total)
