"""A rehearsal: the code of a training step and of an evaluation, on tensors that have shapes and no memory.

Everything runs as on one rank of many, on the device ``meta``, with ranks around it that nothing is sent to. What would be
allocated, computed and sent is written down on the way, so that a forecast follows the code when it changes.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ddpatch.config import Config, ParallelConfig
from ddpatch.data.fields import FieldFile
from ddpatch.data.normalisation import Normalisation
from ddpatch.decomposition import block_range
from ddpatch.execution import fit_groups
from ddpatch.io.volume import VolumeHeader
from ddpatch.ledger import GRADIENTS, Ledger, Meta, Peaks
from ddpatch.parallel.collectives import Exchange
from ddpatch.parallel.comm import Communicator
from ddpatch.parallel.imagined import META, ImaginedRanks
from ddpatch.run import Field, decompose, dtype, replicas, stencil_reach
from ddpatch.statistics.covariance import Moments
from ddpatch.tables import forget
from ddpatch.training import Batch, Training

KEPT = WEIGHTS, AVERAGE, MOMENTS = "weights", "average", "moments"
SAME_MOMENT = 0.1  # of an operation's peak may shrink with more patches, or grow faster than their number
FEW_GROUPS = (2, 4)  # a rehearsal of more groups is extrapolated from these


@dataclass(frozen=True)
class Cost:
    """What one rank spends on a step or an evaluation.

    Attributes:
        patches: Of the rank.
        peaks, flops, attention: Of its :class:`~ddpatch.ledger.Ledger`.
        calls, sent: Number and bytes by kind of communication.
    """

    patches: int
    peaks: Peaks
    flops: int
    attention: int
    calls: Counter[str]
    sent: Counter[str]

    @property
    def memory(self) -> Counter[str]:
        """Bytes by part, when most are allocated together."""
        return max(self.peaks.values(), key=lambda parts: parts.total())


class Rehearsal(Training):
    """A training on data of zeros.

    Arguments:
        config: Resolved configuration.
        header: Of the data.
        comm: Real ranks, or imagined ones.
    """

    def __init__(self, config: Config, header: VolumeHeader, comm: Communicator) -> None:
        super().__init__(config, cast(FieldFile, SimpleNamespace(header=header)), white_field(config, header), comm)
        if self.model.linear is not None:
            self.model.linear.power = self.model.linear.power.to(self.device)

    def next_batch(self) -> Batch:
        """As a batch is shaped."""
        share = len(block_range(self.config.train.batch, self.grid.replicas, self.grid.replica))
        shape = (share, len(self.coupling.patches), len(self.field.channels), *self.decomposition.patch_shape)
        clean = torch.zeros(shape, dtype=dtype(self.config), device=self.device)
        return clean, torch.zeros_like(clean), torch.ones(share, dtype=torch.float64, device=self.device)

    def advance(self) -> float:
        """One step, which leaves no batch to whatever comes next."""
        loss = super().advance()
        self._ahead = None
        return loss

    def fill_moments(self) -> None:
        """What a step leaves to the next: gradients, and what the optimiser keeps."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimiser.step()

    def kept(self) -> dict[str, list[Tensor]]:
        """What stays from step to step, by part."""
        model, average = self.model, self.average.module
        return {
            WEIGHTS: [*model.parameters(), *model.buffers()],
            AVERAGE: [*average.parameters(), *average.buffers()],
            MOMENTS: [item for state in self.optimiser.state.values() for item in state.values() if isinstance(item, Tensor)],
            GRADIENTS: [p.grad for p in model.parameters() if p.grad is not None],
        }

    def watch_coarse(self, ledger: Ledger) -> None:
        """Tell the ledger when the coarse level runs, forward and backward."""
        if not self.config.model.paths.coarse:
            return

        def enter(*_: object) -> None:
            ledger.coarse = True

        def leave(*_: object) -> None:
            ledger.coarse = False

        self.model.coarse.register_forward_pre_hook(enter)
        self.model.coarse.register_forward_hook(leave)
        self.model.coarse.register_full_backward_pre_hook(enter)
        self.model.coarse.register_full_backward_hook(leave)


class Costs(NamedTuple):
    """Of a rank: a training step, and an evaluation of a sampler for the same batch."""

    step: Cost
    evaluation: Cost


def rehearse(config: Config, header: VolumeHeader, ranks: int) -> Costs:
    """What a rank with the most patches spends when ``ranks`` train.

    With many groups of patches the rehearsal is that of two larger numbers of ranks, where a rank has few groups: memory at
    every operation, and the number of operations, are linear in the number of patches.

    Arguments:
        config: Resolved configuration.
        header: Of the data.
        ranks: Number of ranks.

    Raises:
        UserError: if the ranks do not fit the patches and the batch.
    """
    copies = replicas(config, ranks)
    grid = decompose(config, ranks // copies)
    at_once, own = config.execution.patches_at_once, max(grid.counts)
    if at_once is None or own <= FEW_GROUPS[-1] * at_once:
        return rehearse_all(config, header, ranks, copies)
    sizes = [grid.num_patches // (n * at_once) for n in FEW_GROUPS]
    few, more = (rehearse_all(config, header, copies * size, copies) for size in sizes)
    step, evaluation = (extrapolate(getattr(few, name), getattr(more, name), own) for name in ("step", "evaluation"))
    halo = halo_bytes(config, header, ranks, copies) if step.sent["halo"] else 0
    for cost in (step, evaluation):
        cost.sent["halo"] = halo
    return Costs(step, evaluation)


def rehearse_all(config: Config, header: VolumeHeader, ranks: int, copies: int) -> Costs:
    """What a rank with the most patches spends, with all of them."""
    most = max(decompose(config, ranks // copies).counts)
    config = fit_groups(config, decompose(config, ranks // copies))
    config = dataclasses.replace(config, parallel=ParallelConfig(deterministic=config.parallel.deterministic, replicas=copies))
    comm = imagine(config, ranks, copies)
    training = Rehearsal(config, header, comm)
    ledger = Ledger(header.ndim, most, {p.shape for p in training.model.parameters()})
    training.watch_coarse(ledger)
    forget()  # or the tables that another rehearsal made would be missing in this one
    with Meta(), ledger:
        training.fill_moments()
        step = spent(training, ledger, training.advance)
        training.optimiser.zero_grad(set_to_none=True)
        evaluation = spent(training, ledger, lambda: evaluate(training))
    if training.grid.domain is not comm:
        training.grid.domain.free()
    comm.free()
    return Costs(step, evaluation)


def evaluate(training: Rehearsal) -> None:
    """One evaluation, as samplers make it."""
    x, _, sigma = training.next_batch()
    with torch.no_grad():
        training.denoiser(x, sigma)


def spent(training: Rehearsal, ledger: Ledger, action: Callable[[], object]) -> Cost:
    """What an action costs."""
    calls, before = training.grid.calls, training.grid.bytes
    ledger.begin(training.kept())
    action()
    called, sent = training.grid.calls - calls, training.grid.bytes - before
    return Cost(len(training.coupling.patches), ledger.peaks, ledger.flops, ledger.attention, called, sent)


def extrapolate(few: Cost, more: Cost, patches: int) -> Cost:
    """The cost with another number of patches: linear for every part of every operation that both have.

    Where parts shrink with more patches, or grow faster than these, the two peaks of an operation are of different moments, and
    say nothing of any other.
    """
    ratio = more.patches / few.patches

    def at(a: float, b: float) -> int:
        return round(a + (b - a) * (patches - few.patches) / (more.patches - few.patches))

    def each(a: Counter[str], b: Counter[str]) -> Counter[str]:
        return Counter({key: at(a[key], b[key]) for key in a | b})

    def same_moment(a: Counter[str], b: Counter[str]) -> bool:
        grown = sum(max(0.0, b[part] - ratio * a[part]) for part in b)
        return (a - b).total() <= SAME_MOMENT * a.total() and grown <= SAME_MOMENT * b.total()

    both = {name: (few.peaks[name], parts) for name, parts in more.peaks.items() if name in few.peaks}
    same = {name: pair for name, pair in both.items() if same_moment(*pair)}
    peaks = {name: each(*pair) for name, pair in (same or both).items()}
    flops, attention = at(few.flops, more.flops), at(few.attention, more.attention)
    return Cost(patches, peaks, flops, attention, more.calls, each(few.sent, more.sent))


def halo_bytes(config: Config, header: VolumeHeader, ranks: int, copies: int) -> int:
    """Bytes of one halo exchange of a rank with the most patches."""
    comm, grid = imagine(config, ranks // copies, 1), decompose(config, ranks // copies)
    exchange, share = Exchange(grid, comm, config.model.reach), len(block_range(config.train.batch, copies, 0))
    shape = (share, len(exchange.patches), len(header.channels), *grid.patch_shape)
    exchange.halo(torch.empty(shape, dtype=dtype(config), device=META))
    comm.free()
    return comm.bytes["halo"]


def imagine(config: Config, ranks: int, copies: int) -> ImaginedRanks:
    """The rank in the middle of those with the most patches, in the first replica, which has the most samples."""
    counts = decompose(config, ranks // copies).counts
    return ImaginedRanks(counts.count(max(counts)) // 2, ranks, len(counts), config.parallel.deterministic)


def white_field(config: Config, header: VolumeHeader) -> Field:
    """White data of unit deviation, with moments as if the grid were one patch: the network interpolates them to any other."""
    channels, axes = len(header.channels), header.ndim
    stencil = tuple(tuple(float(i == j) for j in range(channels * 3**axes)) for i in range(channels * 3**axes))
    affine = Normalisation((0.0,) * channels, (1.0,) * channels)
    lags = [4 * n + 1 for n in stencil_reach(config)]
    waves = [config.model.tokens // 2] * axes
    near = torch.zeros(channels, channels, *lags, dtype=torch.float64)
    near.flatten(2)[..., math.prod(lags) // 2] = torch.eye(channels)
    power = torch.zeros(channels, channels, *(2 * n + 1 for n in waves[:-1]), waves[-1] + 1, 2, dtype=torch.float64)
    power.view(channels, channels, -1, 2)[..., 0] = torch.eye(channels)[..., None]
    moments = Moments(near, power) if config.model.wiener else None
    return Field(header.channels, header.spacing, affine, 0.01, 100.0, stencil, ((1.0,), (1.0,)), moments, config.domain.patch)
