"""The problem of the benchmarks of time: a training on white noise, since what is computed does not depend on the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ddpatch.config import build
from ddpatch.data.fields import FieldFile
from ddpatch.decomposition import Decomposition
from ddpatch.io.volume import VolumeHeader
from ddpatch.io.writers import open_writer
from ddpatch.parallel.comm import Communicator
from ddpatch.random import Stream, patch_noise
from ddpatch.rehearsal import white_field
from ddpatch.run import measure_field, resolve
from ddpatch.training import Training

CHANNELS = ("u", "v", "w")


@contextmanager
def open_training(
    folder: Path,
    grid: Sequence[int],
    patch: Sequence[int],
    model: dict[str, Any],
    comm: Communicator,
    execution: dict[str, Any] | None = None,
    measured: bool = True,
) -> Iterator[Training]:
    """Train with the defaults but for the model and its execution, one sample per step, on a periodic grid of three channels.
    Collective.

    Arguments:
        folder: For the data; all ranks see it.
        grid, patch: Points per axis.
        model: Keys of the configuration's section.
        comm: All ranks.
        execution: Likewise.
        measured: Whether the moments of the data are measured, or those that white noise has are taken.
    """
    path, decomposition = folder / "noise.h5", Decomposition(tuple(grid), tuple(patch), comm.size)
    write(path, noise_patches(decomposition, comm), decomposition, comm, mode="gather")
    tree = {"domain": {"patch": list(patch)}, "data": {"path": str(path)}, "model": model, "train": {"batch": 1}}
    tree["execution"] = execution or {}
    with FieldFile(path) as file:
        config = resolve(build(tree, "benchmark"), file)
        field = measure_field(config, file, comm) if measured else white_field(config, file.header)
        yield Training(config, file, field, comm)


def noise_patches(grid: Decomposition, comm: Communicator) -> torch.Tensor:
    """White unit noise on the own patches, ``[local patch, channel, *patch_shape]``."""
    shape, own = (len(CHANNELS), *grid.patch_shape), grid.local_patches(comm.rank)
    return patch_noise(shape, 0, Stream.SIMULATION, [0], 0, own, torch.float32)[0]


def write(path: Path, patches: torch.Tensor, grid: Decomposition, comm: Communicator, mode: str = "auto") -> None:
    """Write one sample. Collective."""
    header = VolumeHeader(1, CHANNELS, grid.grid_shape, (1.0,) * grid.ndim, grid.periodic)
    with open_writer(path, header, grid, comm, mode, overwrite=True) as writer:
        writer.write(0, patches)
