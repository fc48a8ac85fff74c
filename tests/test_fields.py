"""Reading boxes of fields: the right numbers, nothing but the box, and a plain word for every mistake."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddpatch.data.fields import FieldFile
from ddpatch.errors import UserError
from ddpatch.io.volume import VolumeHeader, write_volume

SHAPE = (2, 3, 4, 5, 6)


def numbers(shape: Sequence[int] = SHAPE, dtype: str = "float32") -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def store(path: Path, data: np.ndarray, name: str = "fields", **attributes: object) -> Path:
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset(name, data=data)
        dataset.attrs.update(attributes)
    return path


@pytest.fixture(scope="module")
def periodic_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store(tmp_path_factory.mktemp("fields") / "a.h5", numbers())


box = st.tuples(*(st.tuples(st.integers(-9, 9), st.integers(1, 14)) for _ in range(3)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(box=box, sample=st.integers(0, 1), channels=st.none() | st.lists(st.integers(0, 2), min_size=1, max_size=4))
def test_a_box_wraps_wherever_it_begins_and_ends(
    periodic_file: Path, box: tuple[tuple[int, int], ...], sample: int, channels: list[int] | None
) -> None:
    start, shape = zip(*box, strict=True)
    expected = numbers()[sample] if channels is None else numbers()[sample][channels]
    for axis, (a, n) in enumerate(box):
        expected = expected.take(range(a, a + n), axis=1 + axis, mode="wrap")
    with FieldFile(periodic_file) as file:
        assert np.array_equal(file.read(sample, start, shape, channels), expected)


@pytest.mark.parametrize(
    "axes", ["sample channel z y x", "sample z y x channel", "x,y,z,channel,sample", "z y x", "y x z", "channel y x", "y x"]
)
def test_axes_are_read_in_any_order(tmp_path: Path, axes: str) -> None:
    names = axes.replace(",", " ").split()
    everything = numbers((2, 3, 4, 5, 6) if "z" in names else (2, 3, 5, 6))
    order = ["sample", "channel", "z", "y", "x"] if "z" in names else ["sample", "channel", "y", "x"]
    everything = everything[tuple(slice(None) if name in names else slice(1) for name in order)]
    stored = everything.transpose(
        [order.index(name) for name in names] + [i for i, name in enumerate(order) if name not in names]
    )
    path = store(tmp_path / "a.h5", stored.reshape(stored.shape[: len(names)]))
    with FieldFile(path, axes=axes) as file:
        assert file.header.shape == everything.shape
        start, shape = (-1,) * file.header.ndim, (3,) * file.header.ndim
        expected = everything[-1]
        for axis in range(file.header.ndim):
            expected = expected.take(range(-1, 2), axis=1 + axis, mode="wrap")
        assert np.array_equal(file.read(len(everything) - 1, start, shape), expected)


@pytest.mark.parametrize(
    ("stored", "read"),
    [
        ("float64", "float64"),
        (">f8", "float64"),
        ("float16", "float32"),
        (">f4", "float32"),
        ("uint8", "float32"),
        ("int64", "float32"),
    ],
)
def test_numbers_of_every_type_are_read(tmp_path: Path, stored: str, read: str) -> None:
    data = numbers((1, 1, 4, 5), stored)
    with FieldFile(store(tmp_path / "a.h5", data)) as file:
        values = file.read(0, (0, 0), (4, 5))
    assert values.dtype == read == file.header.dtype and values.dtype.isnative and np.array_equal(values, data[0])


def test_only_the_box_is_read(tmp_path: Path) -> None:
    """Read a box of a compressed file in which every tile that the box does not touch is damaged."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("fields", (2, 3, 64, 64, 64), "f4", chunks=(1, 1, 16, 16, 16), compression="gzip")
        dataset[:] = 1.0
        tiles = [dataset.id.get_chunk_info(i) for i in range(dataset.id.get_num_chunks())]
    wanted = {(1, 2, z, y, x) for z in (0, 48) for y in (16,) for x in (32, 48)}
    with path.open("r+b") as raw:
        for tile in tiles:
            if tile.chunk_offset not in wanted:
                raw.seek(tile.byte_offset)
                raw.write(b"\xff" * tile.size)
    with FieldFile(path) as fields:
        assert np.array_equal(fields.read(1, (-4, 18, 40), (8, 9, 16), (2,)), np.ones((1, 8, 9, 16)))
        with pytest.raises(UserError, match="sample 1 cannot be read"):
            fields.read(1, (-4, 18, 40), (8, 9, 25), (2,))


def test_a_larger_file_costs_no_more_memory(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("fields", (1, 1, 4096, 4096, 4096), "f4", chunks=(1, 1, 32, 32, 32))[0, 0, 4095, 0, 7] = 3.0
    with FieldFile(tmp_path / "a.h5") as fields:  # 256 GiB if it were read
        values = fields.read(0, (4094, 0, 0), (4, 2, 8))
    assert values.sum() == values[0, 1, 0, 7] == 3.0


def test_a_file_of_ours_keeps_its_header(tmp_path: Path) -> None:
    header = VolumeHeader(2, ("u", "v"), (4, 6), (0.5, 0.25), (True, False), "float64", {"seed": 5})
    write_volume(tmp_path / "a.h5", header, numbers(header.shape, "float64"))
    with FieldFile(tmp_path / "a.h5") as file:
        assert file.header == header


def test_attributes_give_spacing_periodicity_and_names(tmp_path: Path) -> None:
    data = numbers((1, 2, 4, 8))
    with FieldFile(store(tmp_path / "a.h5", data)) as file:
        assert (file.header.spacing, file.header.periodic, file.header.channels) == ((1.0, 1.0), (True, True), ("c0", "c1"))
    with FieldFile(store(tmp_path / "b.h5", data, domain_length=[9.0, 2.0, 4.0], periodic=False)) as file:
        assert (file.header.spacing, file.header.periodic) == ((0.5, 0.5), (False, False))
    with h5py.File(tmp_path / "b.h5", "r+") as raw:
        raw.attrs["channel_names"] = ["u", "v"]
        raw["fields"].attrs["spacing"] = 0.25
    with FieldFile(tmp_path / "b.h5") as file:
        assert (file.header.spacing, file.header.channels) == ((0.25, 0.25), ("u", "v"))
    with pytest.raises(UserError, match="'spacing' has 2 values for a grid of 3 axes"):
        FieldFile(store(tmp_path / "c.h5", numbers(), spacing=[1.0, 2.0]))


def test_a_wall_is_not_crossed(tmp_path: Path) -> None:
    data = numbers((1, 1, 4, 8))
    with FieldFile(store(tmp_path / "a.h5", data, periodic=[False, True])) as file:
        assert np.array_equal(file.read(0, (2, -2), (2, 4))[0], data[0, 0, 2:].take(range(-2, 2), 1, mode="wrap"))
        for start in (-1, 1):
            with pytest.raises(UserError, match=r"of axis y are outside the grid of 4 points"):
                file.read(0, (start, 0), (4, 8))
        with pytest.raises(UserError, match=r"no sample 1, expected 0 to 0"):
            file.read(1, (0, 0), (1, 1))
        with pytest.raises(UserError, match=r"no channel 3, expected 0 to 0"):
            file.read(0, (0, 0), (1, 1), (3,))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_located(tmp_path: Path, value: float) -> None:
    data = numbers()
    data[1, 2, 3, 0, 5] = value
    with FieldFile(store(tmp_path / "a.h5", data)) as file:
        assert np.isfinite(file.read(1, (0, 1, 0), (4, 4, 6))).all()
        with pytest.raises(UserError, match=rf"'fields': {value} in sample 1, channel 2, grid index \[3, 0, 5\]"):
            file.read(1, (-1, 3, 4), (2, 4, 3), (0, 2))


def test_a_missing_file_or_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.h5: no such file"):
        FieldFile(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("hello")
    with pytest.raises(UserError, match=r"text\.h5: is not an HDF5 file"):
        FieldFile(tmp_path / "text.h5")
    whole = store(tmp_path / "a.h5", numbers(), "group/velocity")
    for name in ("velocty", "group"):
        with pytest.raises(UserError, match=rf"no dataset '{name}'.*it has group/velocity"):
            FieldFile(whole, name)
    (tmp_path / "cut.h5").write_bytes(whole.read_bytes()[:1500])
    with pytest.raises(UserError, match=r"cut\.h5: cannot be opened: .*truncated"):
        FieldFile(tmp_path / "cut.h5", "group/velocity")


@pytest.mark.parametrize(
    "data", [np.zeros((1, 1, 4, 4), "c8"), np.zeros((1, 1, 4, 4), "S3"), np.zeros((1, 1, 4, 4), [("u", "f4")])]
)
def test_what_is_not_a_real_number_is_refused(tmp_path: Path, data: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"has type .*, expected real numbers or integers"):
        FieldFile(store(tmp_path / "a.h5", data))


@pytest.mark.parametrize(
    ("shape", "axes", "message"),
    [
        ((4, 4), None, "has 2 axes, expected sample channel"),
        ((1, 1, 1, 4, 4, 4), None, "has 6 axes, expected sample channel"),
        ((4, 4), "z y x", r"names 3 axes, the dataset has 2: \[4, 4\]"),
        ((4, 4), "y y", "expected some order of: sample channel z y x"),
        ((4, 4), "time x", "expected some order of: sample channel z y x"),
        ((4, 4), "z y", "y and x are needed"),
        ((0, 1, 4, 4), None, "is empty"),
    ],
)
def test_axes_that_do_not_match_are_refused(tmp_path: Path, shape: tuple[int, ...], axes: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        FieldFile(store(tmp_path / "a.h5", np.zeros(shape)), axes=axes)


def test_a_virtual_source_that_is_missing_is_named(tmp_path: Path) -> None:
    part = store(tmp_path / "part.h5", numbers())
    layout = h5py.VirtualLayout(SHAPE, "f4")
    layout[:] = h5py.VirtualSource("part.h5", "fields", SHAPE)
    with h5py.File(tmp_path / "joint.h5", "w") as file:
        file.create_virtual_dataset("fields", layout)
    with FieldFile(tmp_path / "joint.h5") as joint:
        assert np.array_equal(joint.read(1, (0, 0, 0), SHAPE[2:]), numbers()[1])
    part.unlink()
    with pytest.raises(UserError, match=r"refers to the file .*part\.h5, which is missing"):
        FieldFile(tmp_path / "joint.h5")


def test_all_shared_data_is_read_as_stored(shared_data: Path) -> None:
    seen = 0
    for path in sorted(shared_data.glob("*.h5")):
        with h5py.File(path) as raw:
            found: list[str] = []
            raw.visititems(lambda name, item, found=found: found.append(name) if getattr(item, "ndim", 0) >= 4 else None)
            for name in found:
                with FieldFile(path, name) as fields:
                    assert fields.header.shape == raw[name].shape
                    shape = tuple(min(8, n) for n in fields.header.grid_shape)
                    start = [n - m for n, m in zip(fields.header.grid_shape, shape, strict=True)]
                    corner = (0, slice(None), *(slice(a, None) for a in start))
                    assert np.array_equal(fields.read(0, start, shape), raw[name][corner].astype("f4"))
                    seen += 1
    assert seen >= 10


def test_shared_turbulence_has_its_physical_spacing(shared_data: Path) -> None:
    with FieldFile(shared_data / "hit_fluidsim_128.h5", "velocity") as fields:
        assert fields.header.spacing == pytest.approx((2 * np.pi / 128,) * 3)
        assert fields.header.periodic == (True,) * 3 and fields.header.attributes["viscosity"] == pytest.approx(4.272e-3)
