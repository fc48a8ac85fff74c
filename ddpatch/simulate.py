"""Simulating data sets of turbulence: independent trajectories, each run whole by one rank, one file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpatch import __version__
from ddpatch.data import kolmogorov, turbulence
from ddpatch.data.spectral import Flow, SpectralGrid, advance
from ddpatch.decomposition import block_range
from ddpatch.errors import UserError, nearest
from ddpatch.io.volume import VolumeHeader, refuse_existing, write_volume
from ddpatch.parallel.comm import Communicator
from ddpatch.random import Stream, generator

KINDS = ("isotropic", "kolmogorov")
CHANNELS = {
    ("isotropic", "velocity"): ("u", "v", "w"),
    ("kolmogorov", "velocity"): ("u", "v"),
    ("kolmogorov", "vorticity"): ("vorticity",),
}
SAMPLES_PER_TRAJECTORY = 6
SMALLEST_GRID = 16
POINTS_PER_THREAD = 2**17  # more threads wait for each other longer than they compute

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Plan:
    """What is simulated. Nothing in it depends on the number of ranks.

    Sample numbers run through trajectory 0 first, then trajectory 1, and so on; trajectory t has the samples
    ``block_range(samples, trajectories, t)`` and the random initial state keyed by (seed, t).

    Arguments:
        kind: ``isotropic`` (three-dimensional) or ``kolmogorov`` (two-dimensional).
        samples: Number of snapshots in all.
        points: Points of the grid on every axis.
        seed: Of the initial states.
        trajectories: Number of independent simulations that share the samples.
        viscosity: Kinematic viscosity; ``None`` takes one that the grid resolves.
        variable: ``velocity``, or for Kolmogorov flow ``vorticity``.

    Raises:
        UserError: if a value is out of its range.
    """

    kind: str
    samples: int
    points: int
    seed: int
    trajectories: int
    viscosity: float | None
    variable: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"simulate: unknown kind '{self.kind}'{nearest(self.kind, KINDS)}; expected {' or '.join(KINDS)}")
        if (self.kind, self.variable) not in CHANNELS:
            known = " or ".join(variable for kind, variable in CHANNELS if kind == self.kind)
            raise UserError(f"simulate: variable '{self.variable}' of {self.kind} flow, expected {known}")
        if self.points < SMALLEST_GRID or self.points % 2:
            raise UserError(f"simulate: grid {self.points}, expected an even number of points per axis, at least {SMALLEST_GRID}")
        if self.samples < 1:
            raise UserError(f"simulate: {self.samples} samples, expected 1 or more")
        if not 1 <= self.trajectories <= self.samples:
            raise UserError(f"simulate: {self.trajectories} trajectories, expected 1 to {self.samples}, the number of samples")
        if self.viscosity is not None and not 0 < self.viscosity < math.inf:
            raise UserError(f"simulate: viscosity {self.viscosity}, expected a positive number")

    def flow(self, device: torch.device) -> Flow:
        """The flow on its grid."""
        if self.kind == "isotropic":
            viscosity = self.viscosity or turbulence.resolved_viscosity(self.points)
            return turbulence.IsotropicTurbulence(SpectralGrid(self.points, 3, device=device), viscosity)
        viscosity = self.viscosity or kolmogorov.resolved_viscosity(self.points)
        return kolmogorov.KolmogorovFlow(SpectralGrid(self.points, 2, device=device), viscosity)

    def header(self, flow: Flow, statistics: dict[str, float]) -> VolumeHeader:
        """The description of the file: axes, channels and provenance."""
        ndim = flow.grid.ndim
        shares = [block_range(self.samples, self.trajectories, t) for t in range(self.trajectories)]
        attributes: dict[str, Any] = {
            **flow.attributes(),
            **statistics,
            "time_spacing": flow.interval,
            "time": np.array([(flow.spin_up + i) * flow.interval for share in shares for i in range(len(share))]),
            "trajectory": np.array([t for t, share in enumerate(shares) for _ in share]),
            "seed": self.seed,
            "k_max": flow.grid.cutoff,
            "ddpatch_version": __version__,
        }
        spacing = (2 * math.pi / self.points,) * ndim
        channels = CHANNELS[self.kind, self.variable]
        return VolumeHeader(self.samples, channels, flow.grid.shape, spacing, (True,) * ndim, attributes=attributes)


def simulate(
    kind: str,
    output: str | Path,
    samples: int,
    grid: int,
    seed: int = 0,
    trajectories: int | None = None,
    viscosity: float | None = None,
    comm: Communicator | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
    variable: str = "velocity",
) -> None:
    """Simulate turbulence and write snapshots of its steady state to one file. Collective.

    Every trajectory is computed whole, in double precision, by one rank and alone, so that the file does not depend on the
    number of ranks. Channels ``u``, ``v``, ``w`` are the velocity components along the axes x, y, z of the grid ``[z,] y, x``.

    Arguments:
        kind: ``isotropic``: forced homogeneous isotropic turbulence in three dimensions
            (:class:`~ddpatch.data.turbulence.IsotropicTurbulence`); ``kolmogorov``: two-dimensional Kolmogorov flow
            (:class:`~ddpatch.data.kolmogorov.KolmogorovFlow`).
        output: The HDF5 file, with dataset ``fields`` of shape ``[sample, channel, (z,) y, x]``, float32.
        samples: Number of snapshots.
        grid: Points on every axis.
        seed: Of the initial states.
        trajectories: Number of independent simulations that share the samples. Default: one for every 6 samples.
        viscosity: Kinematic viscosity. Default: what the grid resolves.
        comm: The ranks that share the trajectories. Default: all ranks of the job.
        device: ``cpu``, ``cuda`` or ``auto``.
        overwrite: Whether an existing file may be replaced.
        progress: Called on rank 0 with the number of intervals simulated there and their total.
        variable: ``velocity``, or for Kolmogorov flow ``vorticity``.

    Raises:
        UserError: if a value is out of its range, if there are more ranks than trajectories, or if the file exists.
    """
    comm = Communicator() if comm is None else comm
    if trajectories is None:
        trajectories = math.ceil(samples / SAMPLES_PER_TRAJECTORY)
    plan = Plan(kind, samples, grid, seed, trajectories, viscosity, variable)
    if comm.size > trajectories:
        raise UserError(f"simulate: {comm.size} ranks for {trajectories} trajectories; start at most one rank per trajectory")
    comm.on_root(lambda: refuse_existing(Path(output), overwrite))
    flow = plan.flow(comm.place(device))
    own = block_range(trajectories, comm.size, comm.rank)
    with _fewer_threads(math.prod(flow.grid.shape)):
        fields, numbers = _run(plan, flow, own, progress if comm.rank == 0 else None)
    everywhere = [line for lines in comm.gather(numbers) for line in lines]
    means = {name: float(np.mean([line[name] for line in everywhere])) for name in everywhere[0]}
    rows = comm.gather_rows(fields, comm.gather(len(fields)))
    if comm.rank == 0:
        write_volume(output, plan.header(flow, means), (row.numpy() for row in rows), overwrite)
    else:
        list(rows)  # sends the rows
    comm.barrier()


def _run(plan: Plan, flow: Flow, trajectories: range, progress: Progress | None) -> tuple[Tensor, list[dict[str, float]]]:
    """Snapshots of some trajectories, with shape ``[sample, channel, *grid]`` on the CPU, and the statistics of each."""
    counts = [len(block_range(plan.samples, plan.trajectories, t)) for t in trajectories]
    total = sum(counts) + len(counts) * (flow.spin_up - 1)
    fields = torch.empty(sum(counts), len(CHANNELS[plan.kind, plan.variable]), *flow.grid.shape)
    statistics: list[dict[str, float]] = []
    done = 0
    for trajectory, count in zip(trajectories, counts, strict=True):
        draw = generator(plan.seed, Stream.SIMULATION, trajectory)
        for interval, state in enumerate(_states(flow, draw, flow.spin_up + count - 1), 1):
            if interval >= flow.spin_up:
                fields[len(statistics)] = getattr(flow, plan.variable)(state)
                statistics.append(flow.statistics(state))
            done += 1
            if progress is not None:
                progress(done, total)
    return fields, statistics


def _states(flow: Flow, draw: np.random.Generator, intervals: int) -> Iterator[Tensor]:
    """The states at the end of every interval of one trajectory."""
    state = flow.initial(draw)
    for _ in range(intervals):
        state = flow.refresh(advance(flow, state, flow.interval))
        yield state


@contextmanager
def _fewer_threads(points: int) -> Iterator[None]:
    """Use no more threads than the number of grid points keeps busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, points // POINTS_PER_THREAD)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
