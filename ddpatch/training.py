"""The state of a training, and one step of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpatch.config import Config
from ddpatch.data.batches import PatchBatches
from ddpatch.data.fields import FieldFile
from ddpatch.decomposition import block_range
from ddpatch.diffusion.average import AveragedModel
from ddpatch.errors import UserError
from ddpatch.execution import compile_fine_level, keep_freed_memory
from ddpatch.io import checkpoint
from ddpatch.model.ferry import send
from ddpatch.notice import Notice
from ddpatch.parallel.collectives import Exchange
from ddpatch.parallel.comm import Communicator
from ddpatch.parallel.gradients import GradientSum
from ddpatch.parallel.grid import make_grid
from ddpatch.random import Stream, generator, patch_noise
from ddpatch.run import (
    Field,
    decompose,
    dtype,
    make_denoiser,
    make_model,
    make_optimiser,
    replicas,
    training_samples,
)

MOST_SKIPPED = 10
BROKEN, LEAVE = 1, 2  # what ranks tell each other after every step
Batch = tuple[Tensor, Tensor, Tensor]


class Training:
    """The state of a training run on this rank, and one step of it.

    Every parameter, moment and average is replicated on all ranks; a rank owns only its patches of its replica's samples.

    Arguments:
        config: Resolved configuration.
        file: The training fields.
        field: What was measured on them.
        comm: All ranks of the run.
        notice: Asked after every step whether to leave.
    """

    def __init__(self, config: Config, file: FieldFile, field: Field, comm: Communicator, notice: Notice | None = None) -> None:
        self.config, self.field, self.comm, self.notice = config, field, comm, notice or Notice()
        self.device = comm.place(config.parallel.device, config.parallel.share_device)
        comm.connect(config.parallel.transport, self.device)
        keep_freed_memory(self.device, config.execution.patches_at_once)
        self.grid = make_grid(comm, replicas(config, comm.size))
        self.decomposition = decompose(config, self.grid.domain.size)
        self.coupling = Exchange(self.decomposition, self.grid.domain, config.model.reach)
        self.model = make_model(config, field).to(self.device)
        self.gradients = GradientSum(self.model.parameters(), comm)
        self.average = AveragedModel(self.model, config.train.ema)
        self.optimiser = make_optimiser(config, self.model)
        self.denoiser = make_denoiser(config, field, self.model, self.coupling)
        compile_fine_level(self.model, config.execution)
        self.batches = PatchBatches(
            file,
            training_samples(config, file),
            self.decomposition,
            self.coupling.patches,
            field.normalisation,
            config.train.seed,
            config.data.shift,
        )
        self.step = self.samples_seen = self.skipped = self.in_a_row = 0
        self.leaving = False
        self._ahead: Batch | None = None

    def advance(self) -> float:
        """One optimiser step on the next batch; returns the loss, the mean over all elements. Collective.

        Where loss or gradients are not finite, on whichever rank, no rank takes the step: it is counted, and the loss is NaN.
        A device is waited for once, when it has been told all but the update, and while it works the next batch is read.

        Raises:
            UserError: on all ranks, after :data:`MOST_SKIPPED` such steps in a row.
        """
        train = self.config.train
        total = self.accumulate(*self._take_batch())
        self.gradients.finish()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), train.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.step, train.steps, train.warmup) * train.learning_rate
        self.step += 1
        self.samples_seen += train.batch
        self._ahead = self.next_batch() if self.step < train.steps else None
        loss = float(total + 0 * norm)  # not finite where either is not
        flags = self.comm.union(BROKEN * (not math.isfinite(loss)) | LEAVE * self.notice.given())
        finite, self.leaving = not flags & BROKEN, bool(flags & LEAVE)
        if finite:
            self.optimiser.step()
            self.average.update(self.model, train.batch, self.samples_seen)
        self._count(finite)
        return loss if finite else math.nan

    def _count(self, finite: bool) -> None:
        """Count skipped steps, and end the run after too many in a row."""
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.skipped += not finite
        if self.in_a_row == MOST_SKIPPED:
            raise UserError(
                f"training: loss or gradients were not finite in {MOST_SKIPPED} steps in a row, from step "
                f"{self.step - MOST_SKIPPED + 1} on; the weights are those before it"
            )

    def _take_batch(self) -> Batch:
        """The next batch, which the step before may have read."""
        ahead, self._ahead = self._ahead, None
        return self.next_batch() if ahead is None else ahead

    def next_batch(self) -> Batch:
        """Own clean patches and unit noise, ``[sample, local patch, channel, *patch_shape]``, and one σ per sample: those of this
        replica.
        """
        train = self.config.train
        share = block_range(train.batch, self.grid.replicas, self.grid.replica)
        draws = range(self.samples_seen + share.start, self.samples_seen + share.stop)
        clean = self.batches.read(draws, dtype(self.config))
        noise = patch_noise(clean.shape[2:], train.seed, Stream.NOISE, draws, 0, self.coupling.patches, clean.dtype)
        uniform = generator(train.seed, Stream.SIGMA, self.step).random()
        sigma = self.field.schedule.training(uniform, train.batch)[share.start : share.stop]
        return send(clean, self.device), send(noise, self.device), send(sigma, self.device)

    def accumulate(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Gradients of the local loss, and the global loss, detached. Collective.

        The local loss is the sum over own patches divided by the global element count, so that the sum over ranks is the mean.
        """
        elements = self.config.train.batch * self.decomposition.num_points * clean.shape[2]
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.denoiser.loss(clean, noise, sigma) / elements
        with torch.autograd.set_multithreading_enabled(False):
            loss.backward()
        return self.comm.allreduce_(loss.detach()[None])[0]

    def state(self) -> dict[str, Any]:
        """Everything that continues the run on any number of ranks."""
        return {
            "config": self.config.as_dict(),
            "statistics": self.field.as_state(),
            "model": self.model.state_dict(),
            "ema": self.average.module.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "samples_seen": self.samples_seen,
        }

    def restore(self, state: dict[str, Any], origin: Path) -> None:
        """Continue from a checkpoint's state; ``origin`` names it in messages."""
        checkpoint.restore_weights(self.model, state["model"], origin)
        checkpoint.restore_weights(self.average.module, state["ema"], origin)
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.samples_seen, self._ahead = state["step"], state["samples_seen"], None


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a half cosine to zero at the last step; relative to the largest."""
    ramp = min(1.0, (step + 1) / (warmup + 1))
    return ramp * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
