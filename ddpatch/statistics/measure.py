"""All sums over one file, sample by sample: what the curves and the figures of the report are made of."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddpatch.decomposition import Index, block_range
from ddpatch.parallel.comm import Communicator
from ddpatch.statistics import gradients, increments, seams
from ddpatch.statistics.slabs import Fields, pieces
from ddpatch.statistics.spectrum import Spectrum

PDF_DISTANCES = (1, 2, 4, 8)
SCALE_SAMPLES = 4
Sums = dict[str, Tensor]


@dataclass(frozen=True)
class Plan:
    """What is measured, the same for the samples and for the reference.

    Arguments:
        channels: Number of channels; as many as axes makes the field a velocity.
        spacing: Distance between points along each axis.
        periodic: Axes that both files close on themselves.
        patch: Points of a patch; the whole grid where there are no patches.
        distances: Separations in points.
        unit: Wave number of shell 1, in radians per length.
        increment_scales: Unit of the increments' histogram at each of ``pdf_distances``.
        vorticity_scale: Unit of the vorticity's histogram.
        patched: Whether there are patches at all.
    """

    channels: int
    spacing: tuple[float, ...]
    periodic: tuple[bool, ...]
    patch: Index
    distances: tuple[int, ...]
    unit: float
    increment_scales: tuple[float, ...] = (1.0,) * len(PDF_DISTANCES)
    vorticity_scale: float = 1.0
    patched: bool = True

    @property
    def ndim(self) -> int:
        """Number of axes of the grid."""
        return len(self.spacing)

    @property
    def velocity(self) -> bool:
        """Whether the channels are the components of a vector."""
        return self.channels == self.ndim

    @property
    def pdf_distances(self) -> tuple[int, ...]:
        """The separations at which increments have a histogram: 1, 2, 4, 8 where the grid allows them."""
        return tuple(r for r in PDF_DISTANCES if r in self.distances)


def measure(fields: Fields, samples: Sequence[int], plan: Plan, comm: Communicator) -> Sums:
    """The sums of every sample, on all ranks, each with shape ``[sample, ...]``. Collective.

    Rows of axis 0, then of axis 1, are dealt out to the ranks, and read in pieces bounded in memory.
    """
    header = fields.header
    spectrum = Spectrum(header.grid_shape, header.spacing, plan.periodic, comm, plan.unit)
    totals: dict[str, list[Tensor]] = defaultdict(list)
    for sample in samples:
        for key, value in measure_sample(fields, sample, plan, spectrum, comm).items():
            totals[key].append(value)
    return {key: torch.stack(values) for key, values in totals.items()}


def measure_sample(fields: Fields, sample: int, plan: Plan, spectrum: Spectrum, comm: Communicator) -> Sums:
    """The sums of one sample, on all ranks. Collective."""
    sums = _zeros(plan, fields.header.grid_shape)
    if plan.velocity:
        sums["energy"], sums["solenoidal"] = spectrum.energy_and_divergence(fields, sample)
    else:
        sums["energy"] = spectrum.energy(fields, sample)
    for axis in (0, 1):
        rows = block_range(fields.header.grid_shape[axis], comm.size, comm.rank)
        for piece in pieces(fields, sample, axis, rows, ring=1 - axis, periodic=plan.periodic[axis]):
            if axis == 0:
                _add_slopes(sums, piece.values, plan)
                _add_means(sums, piece.core, piece.rows.start, plan)
            for along in range(1, plan.ndim) if axis == 0 else (0,):
                _add_lines(sums, piece.core, along, plan)
    sums = {key: comm.allreduce_(value) for key, value in sums.items()}
    means = sums.pop("patches") / math.prod(plan.patch)
    sums["neighbours"] = seams.neighbour_sums(means, plan.periodic)
    return sums


def with_scales(fields: Fields, plan: Plan, comm: Communicator) -> Plan:
    """The plan with the units of the histograms: standard deviations in a few samples spread over the reference. Collective.

    They are rounded to four digits, so that the last bit of a sum over ranks cannot move a value to another bin.
    """
    count = fields.header.samples
    sums = measure(fields, range(0, count, -(-count // SCALE_SAMPLES)), plan, comm)
    powers = sums["increments"].sum((0, 1))
    picked = [plan.distances.index(r) for r in plan.pdf_distances]
    widths = (powers[picked, 0] / powers[picked, 4]).sqrt().tolist()
    square, count_ = sums["vorticity_square"].sum(0).tolist()
    scales = tuple(_rounded(width) for width in widths)
    return replace(plan, increment_scales=scales, vorticity_scale=_rounded((square / max(count_, 1.0)) ** 0.5))


def _rounded(value: float) -> float:
    return float(f"{value:.3e}") or 1.0


def _zeros(plan: Plan, grid_shape: Index) -> Sums:
    shapes = {
        "solenoidal": (2,),
        "slopes": (3,),
        "vorticity": (increments.BINS,),
        "vorticity_square": (2,),
        "increments": (plan.ndim, len(plan.distances), 5),
        "increment_histogram": (len(plan.pdf_distances), increments.BINS),
        "jumps": (plan.ndim, 2, max(plan.patch), 2),
        "pairs": (plan.ndim, len(plan.distances), 2, plan.channels, 6),
        "moments": (plan.channels, 3),
        "patches": (plan.channels, *(n // p for n, p in zip(grid_shape, plan.patch, strict=True))),
    }
    return {key: torch.zeros(shape, dtype=torch.float64) for key, shape in shapes.items()}


def _add_slopes(sums: Sums, values: Tensor, plan: Plan) -> None:
    slopes = gradients.gradient(values, plan.spacing, plan.periodic)
    if plan.velocity:
        sums["slopes"] += gradients.gradient_sums(slopes)
    swirl = gradients.vorticity(slopes) if plan.velocity else slopes
    sums["vorticity"] += increments.histogram(swirl, plan.vorticity_scale)
    sums["vorticity_square"] += torch.tensor([float(swirl.square().sum()), float(swirl.numel())], dtype=torch.float64)


def _add_means(sums: Sums, core: Tensor, first_row: int, plan: Plan) -> None:
    grid = tuple(sums["patches"].shape[1:])
    sums["patches"] += seams.patch_sums(core, first_row, plan.patch, grid)
    flat = core.flatten(1)
    sums["moments"] += torch.stack([flat.sum(1), flat.square().sum(1), torch.full((len(flat),), float(flat.shape[1]))], -1)


def _add_lines(sums: Sums, core: Tensor, axis: int, plan: Plan) -> None:
    lines, periodic, patch = increments.lines_along(core, axis).contiguous(), plan.periodic[axis], plan.patch[axis]
    component = plan.ndim - 1 - axis
    longitudinal = lines[component : component + 1] if plan.velocity else lines
    sums["increments"][axis] += increments.increment_sums(longitudinal, plan.distances, periodic)
    scales = plan.increment_scales[: len(plan.pdf_distances)]
    counts = increments.increment_histogram(longitudinal, plan.pdf_distances, scales, periodic)
    sums["increment_histogram"] += counts
    sums["jumps"][axis, :, :patch] += seams.jump_sums(lines, patch, periodic)
    sums["pairs"][axis] += seams.pair_sums(lines, patch, plan.distances, periodic)
