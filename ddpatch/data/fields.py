"""Fields read from an HDF5 dataset, a box at a time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from ddpatch.errors import UserError, nearest
from ddpatch.io.volume import AXES, VolumeHeader

RESERVED = {"channel_names", "spacing", "periodic", "domain_length", "DIMENSION_LIST", "DIMENSION_LABELS", "REFERENCE_LIST"}
CACHE_BYTES = 2**26  # compressed files are stored in tiles that boxes share; a tile that is not kept is decompressed again
Run = tuple[int, int, int]  # where it lies in the result, where it starts in the file, how long it is


class FieldFile:
    """A dataset of fields, open for reading; a context manager.

    Names of channels, spacing and periodicity come from the attributes ``channel_names``, ``spacing`` (or ``domain_length``, or
    1) and ``periodic`` (or true) of the dataset or, failing that, of the file. An attribute longer than the grid has axes belongs
    to its last axes: a file may keep slices beside volumes.

    Arguments:
        path: HDF5 file.
        name: Dataset of real or integer numbers.
        axes: Names of its axes in the order of the file, for example ``sample z y x channel``. Default:
            ``sample channel [z] y x``. A missing ``sample`` or ``channel`` axis counts as length 1.

    Attributes:
        header: Shape, names, spacing and provenance; its ``dtype`` is that of the arrays that :meth:`read` returns.

    Raises:
        UserError: if there is no such file or dataset, if its type or axes do not fit, or if a file that a virtual dataset refers
            to is missing.
    """

    def __init__(self, path: str | Path, name: str = "fields", axes: str | None = None) -> None:
        self.path, self.name = Path(path), name
        self._file = _open(self.path)
        try:
            self._dataset = _find(self._file, self.path, name)
            _check_sources(self._dataset, self.path)
            self._axes = self._checked_axes(axes)
            self.header = self._read_header()
        except UserError:
            self._file.close()
            raise
        except Exception as error:  # a damaged file raises whatever its bytes happen to mean
            self._file.close()
            raise UserError(f"{self.path}: dataset '{name}' cannot be read, the file is damaged: {_reason(error)}") from None

    def __enter__(self) -> FieldFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, sample: int, start: Sequence[int], shape: Sequence[int], channels: Sequence[int] | None = None) -> np.ndarray:
        """Read a box of one sample, touching nothing else of the file.

        Arguments:
            sample: Number of the sample.
            start: First grid index of the box on every axis. On periodic axes the box may begin and end anywhere and wraps.
            shape: Points of the box.
            channels: Channels to read. Default: all.

        Returns:
            Array of shape ``[channel, *shape]``; float64 if the file stores that, else float32.

        Raises:
            UserError: if the box leaves the grid on an axis that is not periodic, if sample or channel do not exist, if a number
                is not finite, or if the file is damaged.
        """
        picked = range(self.header.shape[1]) if channels is None else channels
        self._check_picked(sample, picked)
        runs = [_consecutive(picked), *(self._wrapped(axis, a, n) for axis, (a, n) in enumerate(zip(start, shape, strict=True)))]
        box = np.empty((len(picked), *shape), self.header.dtype)
        for pieces in product(*runs):
            target = tuple(slice(to, to + n) for to, _, n in pieces)
            box[target] = self._hyperslab(sample, [slice(a, a + n) for _, a, n in pieces])
        self._check_finite(box, sample, picked, start)
        return box

    def _hyperslab(self, sample: int, box: Sequence[slice]) -> np.ndarray:
        names = ("channel", *self.header.axes[2:])
        wanted = dict(zip(names, box, strict=True))
        kept = [name for name in self._axes if name != "sample"]
        try:
            values = self._dataset[tuple(sample if name == "sample" else wanted[name] for name in self._axes)]
        except Exception as error:  # a damaged file raises whatever its bytes happen to mean
            raise UserError(f"{self.path}: dataset '{self.name}': sample {sample} cannot be read: {_reason(error)}") from None
        if "channel" not in kept:
            values, kept = values[None], ["channel", *kept]
        ordered: np.ndarray = values.transpose([kept.index(name) for name in names])
        return ordered

    def _wrapped(self, axis: int, start: int, length: int) -> list[Run]:
        size = self.header.grid_shape[axis]
        if not self.header.periodic[axis] and (start < 0 or start + length > size):
            raise UserError(
                f"{self.path}: dataset '{self.name}': points {start} to {start + length - 1} of axis "
                f"{self.header.axes[2 + axis]} are outside the grid of {size} points, which is not periodic on this axis"
            )
        runs, done = [], 0
        while done < length:
            first = (start + done) % size
            count = min(size - first, length - done)
            runs.append((done, first, count))
            done += count
        return runs

    def _check_picked(self, sample: int, channels: Sequence[int]) -> None:
        for key, wanted, count in (("sample", [sample], self.header.samples), ("channel", channels, len(self.header.channels))):
            for number in wanted:
                if not 0 <= number < count:
                    raise UserError(f"{self.path}: dataset '{self.name}': no {key} {number}, expected 0 to {count - 1}")

    def _check_finite(self, box: np.ndarray, sample: int, channels: Sequence[int], start: Sequence[int]) -> None:
        finite = np.isfinite(box)
        if finite.all():
            return
        first = tuple(int(i) for i in np.unravel_index(int(finite.argmin()), box.shape))
        channel, *place = first
        index = [(a + i) % n for a, i, n in zip(start, place, self.header.grid_shape, strict=True)]
        raise UserError(
            f"{self.path}: dataset '{self.name}': {box[first]} in sample {sample}, channel {channels[channel]}, "
            f"grid index {index}; expected finite numbers"
        )

    def _checked_axes(self, axes: str | None) -> tuple[str, ...]:
        rank = self._dataset.ndim
        where = f"{self.path}: dataset '{self.name}'"
        if axes is None:
            if rank not in (4, 5):
                raise UserError(f"{where}: has {rank} axes, expected sample channel [z] y x; name its axes with data.axes")
            return (*AXES[:2], *AXES[-(rank - 2) :])
        names = tuple(axes.replace(",", " ").split())
        if len(set(names)) < len(names) or not {"y", "x"} <= set(names) <= set(AXES):
            raise UserError(
                f"{where}: axes '{axes}', expected some order of: {' '.join(AXES)}; y and x are needed, each at most once"
            )
        if len(names) != rank:
            raise UserError(
                f"{where}: axes '{axes}' names {len(names)} axes, the dataset has {rank}: {list(self._dataset.shape)}"
            )
        return names

    def _read_header(self) -> VolumeHeader:
        length = dict(zip(self._axes, self._dataset.shape, strict=True))
        grid = tuple(length[axis] for axis in AXES[2:] if axis in length)
        if min(self._dataset.shape) < 1:
            raise UserError(f"{self.path}: dataset '{self.name}' is empty: {list(self._dataset.shape)}")
        periodic = self._per_axis("periodic", len(grid)) or (True,) * len(grid)
        extent = self._per_axis("domain_length", len(grid))
        spacing = tuple(a / n for a, n in zip(extent, grid, strict=True)) if extent else (1.0,) * len(grid)
        known = {**self._file.attrs, **self._dataset.attrs}
        return VolumeHeader(
            length.get("sample", 1),
            self._channel_names(length.get("channel", 1)),
            grid,
            self._per_axis("spacing", len(grid)) or spacing,
            tuple(bool(value) for value in periodic),
            "float64" if self._dataset.dtype.itemsize == 8 and self._dataset.dtype.kind == "f" else "float32",
            {key: value for key, value in known.items() if key not in RESERVED and not key.startswith("_")},
        )

    def _per_axis(self, key: str, count: int) -> tuple[float, ...] | None:
        value = self._attribute(key)
        if value is None or np.asarray(value).dtype.kind not in "biuf":
            return None
        values = np.atleast_1d(value).ravel()
        if values.size == 1:
            values = values.repeat(count)
        if values.size < count:
            raise UserError(f"{self.path}: attribute '{key}' has {values.size} values for a grid of {count} axes")
        return tuple(float(v) for v in values[-count:])

    def _channel_names(self, count: int) -> tuple[str, ...]:
        value = self._attribute("channel_names")
        names = () if value is None else tuple(v.decode() if isinstance(v, bytes) else str(v) for v in np.atleast_1d(value))
        return names if len(names) == count else tuple(f"c{i}" for i in range(count))

    def _attribute(self, key: str) -> Any:
        return self._dataset.attrs.get(key, self._file.attrs.get(key))


def _open(path: Path) -> h5py.File:
    if not path.exists():
        raise UserError(f"{path}: no such file")
    try:
        return h5py.File(path, "r", rdcc_nbytes=CACHE_BYTES)
    except OSError as error:
        kind = "cannot be opened" if path.is_file() and h5py.is_hdf5(path) else "is not an HDF5 file"
        raise UserError(f"{path}: {kind}: {' '.join(str(error).split())}") from None


def _find(file: h5py.File, path: Path, name: str) -> h5py.Dataset:
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset):
        known: list[str] = []
        file.visititems(lambda key, item: known.append(key) if isinstance(item, h5py.Dataset) else None)
        raise UserError(f"{path}: no dataset '{name}'{nearest(name, known)}; it has {', '.join(known) or 'none'}")
    if dataset.dtype.kind not in "biuf" or dataset.dtype.itemsize > 8:
        raise UserError(f"{path}: dataset '{name}' has type {dataset.dtype}, expected real numbers or integers")
    return dataset


def _check_sources(dataset: h5py.Dataset, path: Path) -> None:
    """Refuse a virtual dataset with a missing source, which HDF5 would silently read as fill values."""
    if not dataset.is_virtual:
        return
    for source in dict.fromkeys(source.file_name for source in dataset.virtual_sources()):
        if source != "." and "%b" not in source and not (path.parent / source).exists():
            raise UserError(f"{path}: dataset '{dataset.name}' refers to the file {path.parent / source}, which is missing")


def _consecutive(numbers: Sequence[int]) -> list[Run]:
    runs: list[Run] = []
    for place, number in enumerate(numbers):
        if runs and number == runs[-1][1] + runs[-1][2]:
            runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
        else:
            runs.append((place, number, 1))
    return runs


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
