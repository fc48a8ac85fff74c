"""Sampling: one loop that reads top to bottom."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpatch import __version__
from ddpatch.config import Config, ExecutionConfig, build
from ddpatch.diffusion.solvers import Denoise, make_solver
from ddpatch.errors import UserError
from ddpatch.io import checkpoint
from ddpatch.io.volume import VolumeHeader
from ddpatch.io.writers import open_writer
from ddpatch.io.xdmf import write_sidecar
from ddpatch.parallel.collectives import Exchange
from ddpatch.parallel.comm import Communicator
from ddpatch.parallel.roll import roll
from ddpatch.random import Stream, generator, patch_noise
from ddpatch.run import Field, check_groups, decompose, dtype, make_denoiser, make_model

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
        patches_at_once: As in the configuration. Default: that of the run, or what there is where ranks have fewer patches.

    Raises:
        UserError: if there is no readable checkpoint, or the grid does not fit the patches or the ranks.
    """

    def __init__(
        self, folder: Path, comm: Communicator, grid: Sequence[int] | None = None, patches_at_once: int | None = None
    ) -> None:
        path, state = checkpoint.load_latest(folder, comm)
        self.config: Config = build(state["config"], str(path))
        self.field = Field.from_state(state["statistics"], path)
        self.samples_seen: int = state["samples_seen"]
        self.comm, self.device = comm, comm.place(self.config.parallel.device)
        if grid is not None and len(grid) != len(self.config.domain.patch):
            raise UserError(f"--grid {' '.join(map(str, grid))}: the run has {len(self.config.domain.patch)} axes")
        if grid is not None and self.config.model.paths.whole and tuple(grid) != self.config.domain.patch:
            raise UserError(
                f"--grid {' '.join(map(str, grid))}: a full-domain model has the grid {list(self.config.domain.patch)}"
            )
        self.decomposition = decompose(self.config, comm.size, grid)
        inherited = self.config.execution.patches_at_once
        if patches_at_once is None and inherited is not None:
            patches_at_once = min(inherited, max(self.decomposition.counts))
        self.config = dataclasses.replace(self.config, execution=ExecutionConfig(patches_at_once))
        check_groups(self.config, self.decomposition)
        self.coupling = Exchange(self.decomposition, comm, self.config.model.reach)
        self.model = make_model(self.config, self.field)
        checkpoint.restore_weights(self.model, state["ema"], path)
        self.denoise = make_denoiser(self.config, self.field, self.model.to(self.device).eval(), self.coupling)

    @torch.no_grad()
    def draw(
        self,
        samples: Sequence[int],
        seed: int,
        solver: str,
        steps: int,
        shift: bool = False,
        progress: Progress = lambda done: None,
    ) -> Tensor:
        """Own patches of some samples in physical units. Collective.

        Arguments:
            samples: Global sample numbers; together with ``seed`` they name the noise.
            seed: Of the series.
            solver: Name of the solver.
            steps: Number of solver steps.
            shift: Move the tiling, where :attr:`movable`.
            progress: Called after every step with the number of steps done.

        Returns:
            Shape ``[sample, local patch, channel, *patch_shape]``.
        """
        shape = (len(self.field.channels), *self.decomposition.patch_shape)
        noise = patch_noise(shape, seed, Stream.SAMPLE, samples, 0, self.coupling.patches, dtype(self.config))
        sigmas = self.field.schedule.steps(steps)
        denoise = MovingTiling(self.denoise, self.coupling, seed) if shift and self.movable else self.denoise
        x = noise.to(self.device).mul_(float(sigmas[0]))
        for done, state in enumerate(make_solver(solver, denoise).trajectory(x, sigmas), start=1):
            x = state
            progress(done)
        return self.field.normalisation.restore(x)

    @property
    def movable(self) -> bool:
        """Whether patches may tile the grid from any origin: it closes on itself, the training drew its origin at random, and
        patches are not told where they are.
        """
        return self.config.data.shift and self.config.model.positions == 0 and any(self.decomposition.periodic)

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
                "config": self.config.as_yaml(),
                **provenance,
            },
        )


def sample(
    folder: Path,
    output: Path,
    count: int,
    comm: Communicator,
    solver: str | None = None,
    steps: int | None = None,
    shift: bool | None = None,
    seed: int = 0,
    grid: Sequence[int] | None = None,
    mode: str | None = None,
    patches_at_once: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Draw samples from a trained run into one file, with an XDMF sidecar. Collective.

    Arguments:
        folder: Of the run.
        output: File of the samples.
        count: Number of samples; sample k depends on ``seed`` and k only.
        comm: The ranks that share every sample.
        solver, steps, shift, mode, patches_at_once: Override the configuration of the run.
        seed: Of the series.
        grid: Points of the samples' grid. Default: that of the training.
        overwrite: Replace an existing file.
        progress: Called on every rank with the solver steps done and to do, all samples together.

    Raises:
        UserError: if run, grid, ranks or output do not fit.
    """
    if count < 1:
        raise UserError(f"--count {count}: expected at least 1 sample")
    sampler = Sampler(folder, comm, grid, patches_at_once)
    defaults = sampler.config.sample
    solver, steps = solver or defaults.solver, steps or defaults.steps
    shift = (defaults.shift if shift is None else shift) and sampler.movable
    batch, total = sampler.config.train.batch, -(-count // sampler.config.train.batch) * steps
    header = sampler.header(count, seed=seed, solver=solver, steps=steps, shift=shift)
    with open_writer(output, header, sampler.decomposition, comm, mode or sampler.config.output.mode, overwrite) as writer:
        for start in range(0, count, batch):
            numbers, before = range(start, min(start + batch, count)), start // batch * steps
            drawn = sampler.draw(numbers, seed, solver, steps, shift, partial(_report, progress, before, total))
            for number, patches in zip(numbers, drawn, strict=True):
                writer.write(number, patches.to("cpu", torch.float32))
    comm.on_root(lambda: write_sidecar(output, header, overwrite=True))


def _report(progress: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    progress(before + done, total)
