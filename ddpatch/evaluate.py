"""The verb ``evaluate``: samples against a reference, with the noise floor of the reference beside every figure."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ddpatch.data.fields import FieldFile
from ddpatch.decomposition import Index
from ddpatch.errors import UserError
from ddpatch.io.volume import refuse_existing, replace_when_complete
from ddpatch.parallel.comm import Communicator
from ddpatch.statistics.comparison import Comparison, compare, resolved_shells
from ddpatch.statistics.increments import separations
from ddpatch.statistics.measure import Plan, Sums, measure, with_scales
from ddpatch.statistics.report import write_report
from ddpatch.statistics.slabs import Crops, Fields
from ddpatch.statistics.spectrum import fundamental

LEAST_POINTS = 4
PLANES = 3


def evaluate(
    samples_path: str | Path,
    reference_path: str | Path,
    output: str | Path,
    comm: Communicator,
    overwrite: bool = False,
    name: str = "fields",
    reference_name: str | None = None,
    axes: str | None = None,
    reference_axes: str | None = None,
    patch: Index | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Compare samples with a reference and write ``metrics.json``, plots and ``report.html``. Collective.

    The two files need the same channels and spacing. A reference on a larger grid is cut into boxes of the samples' grid, each of
    them a sample. Samples on a larger grid than the reference are compared as they are: spectra in shells of the reference,
    everything else at the separations that both grids have. An axis is periodic where it is so in both.

    Arguments:
        samples_path, reference_path: HDF5 files of fields.
        output: Folder of the report.
        overwrite: Whether an existing report may be replaced.
        name, reference_name: Datasets; the reference's is by default that of the samples.
        axes, reference_axes: Names of the axes in the files, as for :class:`FieldFile`.
        patch: Points of a patch. Default: the attribute ``patch_shape`` of the samples; without either, seams are not looked for.
        limit: The most samples to use of either file.

    Returns:
        What ``metrics.json`` holds, on all ranks.

    Raises:
        UserError: if the files cannot be compared, or the report exists.
    """
    folder = Path(output)
    with (
        FieldFile(samples_path, name, axes) as generated,
        FieldFile(reference_path, reference_name or name, reference_axes) as source,
    ):
        reference = comparable(generated, source)
        for file in ("metrics.json", "report.html"):
            comm.on_root(partial(refuse_existing, folder / file, overwrite))
        comparison = compare_fields(generated, reference, comm, patch, limit)
        setting = _setting(generated, source, reference, comparison, limit)
        metrics: dict[str, Any] = comm.broadcast({"setting": setting, **comparison.as_dict()})
        comm.on_root(lambda: _write(folder, metrics, comparison, generated, reference))
    return metrics


def compare_fields(
    generated: Fields, reference: Fields, comm: Communicator, patch: Index | None = None, limit: int | None = None
) -> Comparison:
    """Measure samples and reference and compare them, without writing anything. Collective.

    Arguments:
        generated, reference: The fields, as :func:`comparable` made them.
        patch, limit: As for :func:`evaluate`.

    Raises:
        UserError: if patches do not divide both grids.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit: expected 1 or more samples, got {limit}")
    plan = with_scales(reference, make_plan(generated, reference, patch), comm)
    sums, expected = (measure(fields, _picked(fields, limit), plan, comm) for fields in (generated, reference))
    return compare(sums, expected, plan, _last_shell(generated, reference, expected, plan))


def comparable(generated: FieldFile, reference: FieldFile) -> Fields:
    """The reference, cut into boxes of the samples' grid where it is larger.

    Raises:
        UserError: if channels, spacing or grid do not fit, naming both.
    """
    ours, theirs = generated.header, reference.header
    if ours.ndim != theirs.ndim or len(ours.channels) != len(theirs.channels):
        raise UserError(
            f"{generated.path}: fields [channel, grid] of shape {list(ours.shape[1:])} cannot be compared with "
            f"{list(theirs.shape[1:])} in {reference.path}; expected the same number of channels and axes"
        )
    if not np.allclose(ours.spacing, theirs.spacing, rtol=1e-4, atol=0):
        raise UserError(
            f"{generated.path}: spacing {list(ours.spacing)} differs from {list(theirs.spacing)} in {reference.path}; "
            "expected the same distance between points"
        )
    if min(ours.grid_shape + theirs.grid_shape) < LEAST_POINTS:
        raise UserError(
            f"{generated.path}: grid {list(ours.grid_shape)}, expected at least {LEAST_POINTS} points along each axis"
        )
    sizes = list(zip(ours.grid_shape, theirs.grid_shape, strict=True))
    if all(n == m for n, m in sizes):
        return reference
    if all(n <= m for n, m in sizes):
        return Crops(reference, ours.grid_shape)
    if all(n >= m for n, m in sizes):
        return reference
    raise UserError(
        f"{generated.path}: grid {list(ours.grid_shape)} is larger than {list(theirs.grid_shape)} of {reference.path} along one "
        "axis and smaller along another"
    )


def make_plan(generated: Fields, reference: Fields, patch: Index | None) -> Plan:
    """What to measure on both files.

    Raises:
        UserError: if patches do not divide both grids.
    """
    ours, theirs = generated.header, reference.header
    known = ours.attributes.get("patch_shape")
    if patch is None and known is not None:
        patch = tuple(int(p) for p in np.atleast_1d(known))
    lattice = patch or tuple(math.gcd(n, m) for n, m in zip(ours.grid_shape, theirs.grid_shape, strict=True))
    for grid in (ours.grid_shape, theirs.grid_shape):
        if len(lattice) != len(grid) or any(p < 1 or n % p for n, p in zip(grid, lattice, strict=False)):
            raise UserError(f"patch: {list(lattice)} does not divide the grid {list(grid)}")
    return Plan(
        channels=len(ours.channels),
        spacing=theirs.spacing,
        periodic=tuple(a and b for a, b in zip(ours.periodic, theirs.periodic, strict=True)),
        patch=lattice,
        distances=separations(min(ours.grid_shape + theirs.grid_shape)),
        unit=max(fundamental(header.grid_shape, header.spacing) for header in (ours, theirs)),
        patched=patch is not None,
    )


def _picked(fields: Fields, limit: int | None) -> range:
    """The samples to use: all, or ``limit`` of them spread over the file."""
    count = fields.header.samples
    return range(0, count, 1 if limit is None else max(1, -(-count // limit)))


def _last_shell(generated: Fields, reference: Fields, sums: Sums, plan: Plan) -> int:
    k_max = None
    for header in (generated.header, reference.header):
        if "k_max" in header.attributes:
            k_max = float(header.attributes["k_max"]) * fundamental(header.grid_shape, header.spacing) / plan.unit
    nyquist = min(math.pi / h for h in plan.spacing) / plan.unit
    return resolved_shells(sums["energy"].mean(0).numpy(), nyquist, k_max)


def _setting(
    generated: FieldFile, file: FieldFile, reference: Fields, comparison: Comparison, limit: int | None
) -> dict[str, Any]:
    plan = asdict(comparison.plan)
    sides = {}
    for side, source, fields in (("generated", generated, generated), ("reference", file, reference)):
        grid = list(fields.header.grid_shape)
        cut = list(source.header.grid_shape) if source.header.grid_shape != fields.header.grid_shape else None
        sides[side] = {
            "file": str(source.path),
            "dataset": source.name,
            "samples": len(_picked(fields, limit)),
            "grid": grid,
            "cut_from": cut,
        }
    return {
        **sides,
        "channels": list(generated.header.channels),
        "velocity": comparison.plan.velocity,
        "patch": list(plan["patch"]) if plan["patched"] else None,
        "periodic": list(plan["periodic"]),
        "spacing": list(plan["spacing"]),
        "last_shell": comparison.last_shell,
    }


def _write(folder: Path, metrics: dict[str, Any], comparison: Comparison, generated: Fields, reference: Fields) -> None:
    planes = [_planes(fields) for fields in (reference, generated)]
    with replace_when_complete(folder / "metrics.json", overwrite=True) as temporary:
        temporary.write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    write_report(folder, metrics, comparison, *planes)


def _planes(fields: Fields) -> list[np.ndarray]:
    """The plane in the middle of axis z of the first samples, each with shape ``[channel, y, x]``."""
    grid = fields.header.grid_shape
    start = [grid[0] // 2, 0, 0] if len(grid) == 3 else [0, 0]
    shape = [1, *grid[1:]] if len(grid) == 3 else list(grid)
    count = fields.header.samples
    picked = range(0, count, max(1, count // PLANES))[:PLANES]
    return [fields.read(sample, start, shape).reshape(-1, *grid[-2:]) for sample in picked]
