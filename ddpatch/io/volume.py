"""The one form of all field files: an HDF5 dataset ``[sample, channel, (z,) y, x]`` with named, scaled axes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ddpatch.errors import UserError

AXES = ("sample", "channel", "z", "y", "x")


@dataclass(frozen=True)
class VolumeHeader:
    """What a file of fields holds, besides the numbers.

    Arguments:
        samples: Number of samples.
        channels: Names of the channels.
        grid_shape: Points of the grid, ``([nz,] ny, nx)``.
        spacing: Distance of neighbouring points on each axis of the grid, in units of length.
        periodic: Per axis of the grid, whether it closes on itself.
        dtype: Type of the stored numbers.
        attributes: Provenance: strings, numbers and arrays, stored as HDF5 attributes of the dataset.

    Raises:
        ValueError: if grid, spacing and periodic do not all have two or all have three axes.
    """

    samples: int
    channels: tuple[str, ...]
    grid_shape: tuple[int, ...]
    spacing: tuple[float, ...]
    periodic: tuple[bool, ...]
    dtype: str = "float32"
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.ndim not in (2, 3) or not self.ndim == len(self.spacing) == len(self.periodic):
            raise ValueError(
                f"grid {self.grid_shape}, spacing {self.spacing}, periodic {self.periodic}: expected 2 or 3 axes each"
            )

    @property
    def ndim(self) -> int:
        """Number of axes of the grid."""
        return len(self.grid_shape)

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of the dataset: ``sample``, ``channel``, and those of the grid."""
        return *AXES[:2], *AXES[-self.ndim :]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dataset, ``[sample, channel, *grid_shape]``."""
        return self.samples, len(self.channels), *self.grid_shape


def create_fields(
    file: h5py.Group, header: VolumeHeader, name: str = "fields", layout: h5py.VirtualLayout | None = None
) -> h5py.Dataset:
    """Create the dataset ``[sample, channel, (z,) y, x]`` with its dimension scales and attributes.

    The scales are the sample numbers, the channel names, and the coordinates (index times spacing) of every axis of the grid, so
    that xarray opens the file with ``engine="h5netcdf"``.

    Arguments:
        file: Open file or group, where the scales are created too.
        header: Shape, names and provenance.
        name: Name of the dataset.
        layout: Where the numbers lie, for a virtual dataset. A number whose file is missing then reads as NaN.
    """
    if layout is None:
        dataset = create_dataset(file, name, header.shape, header.dtype)
    else:
        dataset = file.create_virtual_dataset(name, layout, fillvalue=np.nan)
    for axis, (key, values) in enumerate(zip(header.axes, _coordinates(header), strict=True)):
        if key not in file:
            file.create_dataset(key, data=values).make_scale(key)
        dataset.dims[axis].attach_scale(file[key])
        dataset.dims[axis].label = key
    dataset.attrs["channel_names"] = _texts(header.channels)
    dataset.attrs["spacing"] = np.asarray(header.spacing, np.float64)
    dataset.attrs["periodic"] = np.asarray(header.periodic, np.int8)
    for key, value in header.attributes.items():
        dataset.attrs[key] = _attribute(value)
    return dataset


def create_dataset(file: h5py.Group, name: str, shape: tuple[int, ...], dtype: str) -> h5py.Dataset:
    """Create a dataset whose place in the file is fixed at once: writing numbers changes nothing else in it, so that a failure
    never leaves a file that cannot be opened.
    """
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    return file.create_dataset(name, shape, dtype, dcpl=properties)


def write_volume(path: str | Path, header: VolumeHeader, samples: Iterable[np.ndarray], overwrite: bool = False) -> None:
    """Write a file of fields on one rank, one sample in memory at a time.

    Arguments:
        path: The file, which appears under this name when it is complete.
        header: Shape, names and provenance.
        samples: ``header.samples`` arrays of shape ``[channel, *grid_shape]``.
        overwrite: Whether an existing file may be replaced.

    Raises:
        UserError: if the file exists and may not be replaced, or cannot be written.
        ValueError: if the number or the shape of the samples is not the header's.
    """
    with replace_when_complete(path, overwrite) as temporary, h5py.File(temporary, "w") as file:
        dataset = create_fields(file, header)
        for index, sample in zip(range(header.samples), samples, strict=True):
            if sample.shape != header.shape[1:]:
                raise ValueError(f"sample {index} has shape {sample.shape}, expected {header.shape[1:]}")
            dataset[index] = sample


@contextmanager
def replace_when_complete(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path that becomes ``path`` when the body succeeds, and is removed when it fails.

    Raises:
        UserError: if ``path`` exists and may not be replaced, or its folder cannot be written.
    """
    path = Path(path)
    refuse_existing(path, overwrite)
    temporary = temporary_path(path)
    try:
        yield temporary
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Check that a result may be written to ``path``, and make its folder.

    Raises:
        UserError: if ``path`` exists and may not be replaced, or its folder cannot be written.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder, expected the name of a file")
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists already, and is only replaced with overwrite")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot make this folder: {error.strerror}") from None
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path.parent}: no permission to write in this folder")


def temporary_path(path: Path) -> Path:
    """The name of a file while it is incomplete: the same on all ranks, hidden, in the same folder."""
    return path.with_name(f".{path.name}.incomplete")


def publish(temporary: Path, path: Path) -> None:
    """Give a complete and closed file its name, surviving a power failure: fsync of the file, rename, fsync of the folder."""
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Force a closed file, or the list of names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _coordinates(header: VolumeHeader) -> list[np.ndarray]:
    grid = [np.arange(n) * step for n, step in zip(header.grid_shape, header.spacing, strict=True)]
    return [np.arange(header.samples), _texts(header.channels), *grid]


def _texts(texts: Iterable[str]) -> np.ndarray:
    return np.array(list(texts), dtype=h5py.string_dtype())


def _attribute(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, str) for item in value):
        return _texts(value)
    return np.int8(value) if isinstance(value, (bool, np.bool_)) else value
