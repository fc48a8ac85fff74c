"""A plan: what a training needs of every rank, before it is submitted."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from ddpatch.config import Config
from ddpatch.data.fields import FieldFile
from ddpatch.decomposition import Decomposition
from ddpatch.diffusion.solvers import SOLVERS
from ddpatch.errors import UserError
from ddpatch.execution import check_groups, with_groups
from ddpatch.io.volume import VolumeHeader
from ddpatch.ledger import COARSE, FEATURES, FIELDS, GRADIENTS, STATE
from ddpatch.machine import SHARE, Device, find_device
from ddpatch.model.two_level import count_parameters
from ddpatch.parallel.comm import Communicator
from ddpatch.rehearsal import KEPT, Costs, rehearse, white_field
from ddpatch.run import decompose, make_model, replicas, resolve

PROCESS = "process"
SPARE = "freed, kept"
ARRAYS = FIELDS, FEATURES, COARSE
PARTS = (*KEPT, GRADIENTS, *ARRAYS, STATE)
MUCH = 0.1  # of a step's operations for attention, from where fewer keys are worth a word


@dataclass(frozen=True)
class Plan:
    """What a rank with the most patches needs.

    Attributes:
        config: Resolved configuration.
        ranks, replicas: Number of ranks, and of domain groups.
        grid: The patches of a domain group.
        parameters: Of the network.
        device: What a rank runs on.
        costs: Of a training step and of an evaluation, process not included.
    """

    config: Config
    ranks: int
    replicas: int
    grid: Decomposition
    parameters: int
    device: Device
    costs: Costs

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part when a training step needs most."""
        needed = self.costs.step.memory
        spare = round(self.device.spare * sum(needed[part] for part in ARRAYS))
        return {PROCESS: self.device.process, **{part: needed[part] for part in PARTS}, SPARE: spare}

    @property
    def memory(self) -> int:
        """Bytes of a rank in a training step."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether there is as much memory."""
        return self.memory <= self.device.memory

    @property
    def step_seconds(self) -> float:
        """Predicted, without communication."""
        return self.costs.step.flops / self.device.rate

    @property
    def sample_seconds(self) -> float:
        """Predicted for one of the samples that a domain group draws together, without communication."""
        sample = self.config.sample
        evaluations = sample.steps * SOLVERS[sample.solver].evaluations_per_step
        together = -(-self.config.train.batch // self.replicas)
        return evaluations * self.costs.evaluation.flops / self.device.rate / together


def make_plan(config: Config, header: VolumeHeader, ranks: int, device: Device) -> Plan:
    """Plan a training.

    Arguments:
        config: Resolved configuration.
        header: Of the data.
        ranks: Number of ranks.
        device: What each runs on.

    Raises:
        UserError: if ranks, patches and batch do not fit together.
    """
    copies = replicas(config, ranks)
    grid = decompose(config, ranks // copies)
    check_groups(config, grid)
    parameters = count_parameters(make_model(config, white_field(config, header)))
    return Plan(config, ranks, copies, grid, parameters, device, rehearse(config, header, ranks))


def advise(plan: Plan, header: VolumeHeader) -> str:
    """What to change where a plan does not fit: computed, not guessed."""

    def fits(at_once: int, ranks: int = plan.ranks) -> bool:
        return make_plan(with_groups(plan.config, at_once), header, ranks, plan.device).fits

    at_once = largest(fits, max(plan.grid.counts))
    if at_once:
        return f"execution.patches_at_once: {at_once} is the most that fits"
    for groups in range(2 * plan.grid.size, plan.grid.num_patches + 1, plan.grid.size):
        if fits(1, ranks := groups * plan.replicas):
            return f"--ranks {ranks} with execution.patches_at_once: 1 fits"
    return "no number of ranks fits; choose a smaller domain.patch, model.channels or train.batch, or fewer model.tokens"


def largest(holds: Callable[[int], bool], most: int) -> int:
    """The largest number up to ``most`` for which something holds that holds for all smaller ones; 0 if there is none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def read_header(config: Config, channels: int | None) -> tuple[Config, VolumeHeader]:
    """The resolved configuration, and the header of its data; where there are none yet, what stands for it.

    Raises:
        UserError: if there are no data, and the configuration or ``--channels`` leave open what they look like.
    """
    if Path(config.data.path).exists():
        with FieldFile(config.data.path, config.data.name, config.data.axes) as file:
            return resolve(config, file), file.header
    grid = config.domain.grid
    if grid is None or channels is None:
        missing = "domain.grid" if grid is None else "--channels"
        raise UserError(f"{config.data.path}: no such file; without data a plan needs {missing}")
    if channels < 1:
        raise UserError(f"--channels {channels}: expected at least 1")
    axes, samples = len(grid), config.data.holdout + 1
    periodic = config.domain.periodic or (True,) * axes
    if axes not in (2, 3) or len(periodic) != axes:
        raise UserError(f"domain.grid: expected 2 or 3 numbers of points, and as many in domain.periodic, got {list(grid)}")
    header = VolumeHeader(samples, tuple(f"c{i}" for i in range(channels)), grid, (1.0,) * axes, periodic)
    return resolve(config, cast(FieldFile, SimpleNamespace(header=header, path=config.data.path))), header


def page(plan: Plan) -> str:
    """The plan as aligned text."""
    sample, counts, at_once = plan.config.sample, plan.grid.counts, plan.config.execution.patches_at_once
    shape = " × ".join(map(str, plan.grid.patch_shape))
    sent = {"halo": ("halo",), "tokens": ("allgather", "reduce_scatter"), "gradients": ("allreduce",)}
    rows = [
        ("ranks", f"{plan.ranks}, in {plan.replicas} replica{'s' * (plan.replicas > 1)}"),
        ("patches", f"{plan.grid.num_patches} of {shape} points, at most {max(counts)} on a rank, {at_once or 'all'} at once"),
        ("tokens", f"{plan.grid.num_patches * plan.config.model.tokens**plan.grid.ndim}"),
        ("parameters", f"{plan.parameters / 1e6:.2f} M"),
        ("memory of a rank", "GiB, when a training step needs most"),
        *((f"  {part}", f"{size / 2**30:.3f}") for part, size in plan.parts.items()),
        ("  all", f"{plan.memory / 2**30:.3f} of {plan.device.memory / 2**30:.1f}"),
        ("sent by a rank", "MB per training step"),
        *((f"  {name}", f"{sum(plan.costs.step.sent[kind] for kind in kinds) / 1e6:.3f}") for name, kinds in sent.items()),
        ("rate", f"{plan.device.rate / 1e9:.4g} GFLOP/s, {plan.device.source}"),
        ("training step", f"{plan.step_seconds:.3g} s predicted, {plan.costs.step.flops / 1e9:.4g} GFLOP on a rank"),
        ("  attention", describe_attention(plan)),
        ("sample", f"{plan.sample_seconds:.3g} s predicted, {sample.steps} steps of {sample.solver}"),
    ]
    return "\n".join(f"{name:<18} {text}" for name, text in rows)


def describe_attention(plan: Plan) -> str:
    """The share of the coarse level's pairs in a step, and, where that is large, what fewer keys would leave of it."""
    step, keys, axes = plan.costs.step, plan.config.model.keys, plan.grid.ndim
    share = step.attention / step.flops
    if keys == 1 or share < MUCH:
        return f"{share:.1%} of these"
    fewer = max(n for n in range(1, keys) if keys % n == 0)
    left = step.attention * (fewer / keys) ** axes
    return f"{share:.1%} of these; model.coarse_keys: {fewer} leaves {left / (step.flops - step.attention + left):.1%}"


def plan(
    config: Config,
    ranks: int,
    comm: Communicator,
    channels: int | None = None,
    device: str = "cpu",
    memory: float | None = None,
    share: float | None = None,
    ranks_per_node: int | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Say what a training needs of every rank. Collective, though one rank plans for all.

    Where the training chooses how many patches go together (``execution.tune``) and not all fit, the plan is that of one at a
    time.

    Arguments:
        config: As the user wrote it.
        ranks: To plan for.
        comm: Ranks of this process' job.
        channels: Of the fields, where there are no data yet.
        device: ``cpu`` or a GPU's name.
        memory: GiB that a rank may use. Default: the GPU's, or this machine's divided by the ranks on it.
        share: Of a GPU's published peak that is reached. Default: :data:`ddpatch.machine.SHARE`.
        ranks_per_node: Ranks that share a node's memory. Default: one per core of this machine, or all there are.
        say: What is done with the page.

    Raises:
        UserError: if something does not fit together; after the page, if the memory does not suffice, with what to change.
    """
    if ranks < 1:
        raise UserError(f"--ranks {ranks}: expected at least 1")
    config, header = read_header(config, channels)
    per_node = min(ranks, len(os.sched_getaffinity(0))) if ranks_per_node is None else ranks_per_node
    found = find_device(
        device, config, comm, per_node, None if memory is None else memory * 2**30, SHARE if share is None else share
    )
    made = make_plan(config, header, ranks, found)
    if config.execution.tune and not made.fits:
        made = make_plan(with_groups(config, 1), header, ranks, found)
    say(page(made))
    if not made.fits:
        raise UserError(
            f"memory: a rank has {found.memory / 2**30:.3f} GiB and needs {made.memory / 2**30:.3f}; {advise(made, header)}"
        )
