"""The form of field files: what is in them, how they get their name, and the XDMF sidecar that describes them."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import h5py
import numpy as np
import pytest
import xarray

from ddpatch.errors import UserError
from ddpatch.io.volume import VolumeHeader, create_fields, replace_when_complete, write_volume
from ddpatch.io.xdmf import write_sidecar

HEADERS = [
    VolumeHeader(2, ("u", "v", "w"), (3, 4, 5), (0.5, 0.25, 0.125), (True, False, True)),
    VolumeHeader(3, ("p", "q"), (4, 6), (0.5, 0.25), (True, True), "float64"),
]
EVERY_HEADER = pytest.mark.parametrize("header", HEADERS, ids=["3d", "2d"])


def numbers(header: VolumeHeader) -> np.ndarray:
    return np.arange(np.prod(header.shape), dtype=header.dtype).reshape(header.shape)


@EVERY_HEADER
def test_xarray_reads_names_coordinates_and_numbers(tmp_path: Path, header: VolumeHeader) -> None:
    write_volume(tmp_path / "a.h5", header, numbers(header))
    with xarray.open_dataset(tmp_path / "a.h5", engine="h5netcdf") as dataset:
        fields = dataset["fields"]
        assert fields.dims == (("sample", "channel", "z", "y", "x") if header.ndim == 3 else ("sample", "channel", "y", "x"))
        assert fields.dtype == header.dtype and np.array_equal(fields.values, numbers(header))
        assert np.array_equal(dataset["x"], np.arange(header.grid_shape[-1]) * header.spacing[-1])
        assert tuple(dataset["channel"].values) == header.channels
        assert np.array_equal(dataset["sample"], range(header.samples))
        assert np.array_equal(fields.attrs["periodic"], header.periodic)


def test_provenance_of_every_kind_is_stored(tmp_path: Path) -> None:
    given = {"source": "a run", "viscosity": 0.1, "seed": 3, "forced": True, "modes": np.arange(3), "files": ["a", "b"]}
    header = VolumeHeader(1, ("p",), (2, 2), (1.0, 1.0), (True, True), attributes=given)
    write_volume(tmp_path / "a.h5", header, [np.zeros((1, 2, 2))])
    with h5py.File(tmp_path / "a.h5") as file:
        found = dict(file["fields"].attrs)
    assert (found["source"], found["viscosity"], found["seed"], found["forced"]) == ("a run", 0.1, 3, 1)
    assert np.array_equal(found["modes"], np.arange(3)) and list(found["files"]) == ["a", "b"]


def test_two_datasets_share_their_axes(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name in ("fields", "reference"):
            create_fields(file, HEADERS[1], name)
        assert set(file) == {"fields", "reference", "sample", "channel", "y", "x"}


def test_a_header_needs_as_many_spacings_as_axes() -> None:
    with pytest.raises(ValueError, match="expected 2 or 3 axes each"):
        VolumeHeader(1, ("p",), (4, 4), (1.0,), (True, True))
    with pytest.raises(ValueError, match="expected 2 or 3 axes each"):
        VolumeHeader(1, ("p",), (4,), (1.0,), (True,))


def test_an_existing_file_is_kept_unless_asked(tmp_path: Path) -> None:
    path, header = tmp_path / "new" / "a.h5", HEADERS[1]
    write_volume(path, header, numbers(header))
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"a\.h5: exists already"):
        write_volume(path, header, -numbers(header))
    assert path.read_bytes() == before
    write_volume(path, header, -numbers(header), overwrite=True)
    with h5py.File(path) as file:
        assert np.array_equal(file["fields"], -numbers(header))


@pytest.mark.parametrize("count", [1, 4])
def test_too_few_or_too_many_samples_leave_nothing(tmp_path: Path, count: int) -> None:
    with pytest.raises(ValueError, match="zip"):
        write_volume(tmp_path / "a.h5", HEADERS[1], np.zeros((count, *HEADERS[1].shape[1:])))
    assert not list(tmp_path.iterdir())


def test_a_failure_keeps_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="full"), replace_when_complete(path, overwrite=True) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise RuntimeError("full")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: cannot make this folder"):
        write_volume(tmp_path / "file" / "a.h5", HEADERS[1], numbers(HEADERS[1]))
    with pytest.raises(UserError, match=r"is a folder, expected the name of a file"):
        write_volume(tmp_path, HEADERS[1], numbers(HEADERS[1]))


def child(item: ElementTree.Element, path: str) -> ElementTree.Element:
    found = item.find(path)
    assert found is not None
    return found


def words(item: ElementTree.Element) -> list[str]:
    return (item.text or "").split()


def hyperslab(item: ElementTree.Element, folder: Path) -> np.ndarray:
    """What an XDMF reader makes of a HyperSlab item."""
    box, source = item.findall("DataItem")
    rank = int(box.attrib["Dimensions"].split()[1])
    start, stride, count = np.reshape([int(word) for word in words(box)], (3, rank))
    name, _, dataset = (source.text or "").partition(":")
    with h5py.File(folder / name) as file:
        assert [int(n) for n in source.attrib["Dimensions"].split()] == list(file[dataset].shape)
        assert int(source.attrib["Precision"]) == file[dataset].dtype.itemsize
        values: np.ndarray = file[dataset][tuple(slice(a, a + n * s, s) for a, s, n in zip(start, stride, count, strict=True))]
    return values.reshape([int(n) for n in item.attrib["Dimensions"].split()])


@EVERY_HEADER
def test_every_hyperslab_of_the_sidecar_addresses_its_channel(tmp_path: Path, header: VolumeHeader) -> None:
    write_volume(tmp_path / "a.h5", header, numbers(header))
    sidecar = write_sidecar(tmp_path / "a.h5", header)
    grids = ElementTree.parse(sidecar).getroot().findall("Domain/Grid[@CollectionType='Temporal']/Grid")
    assert sidecar == tmp_path / "a.xdmf" and len(grids) == header.samples
    for sample, grid in enumerate(grids):
        scalars = grid.findall("Attribute[@AttributeType='Scalar']")
        assert [scalar.attrib["Name"] for scalar in scalars] == list(header.channels)
        for channel, scalar in enumerate(scalars):
            assert scalar.attrib["Center"] == "Node"
            assert np.array_equal(hyperslab(scalar[0], tmp_path), numbers(header)[sample, channel])
    assert [float(child(grid, "Time").attrib["Value"]) for grid in grids] == list(range(header.samples))


@EVERY_HEADER
def test_the_sidecar_places_the_grid(tmp_path: Path, header: VolumeHeader) -> None:
    grid = child(ElementTree.parse(write_sidecar(tmp_path / "a.h5", header)).getroot(), "Domain/Grid/Grid")
    topology, geometry = child(grid, "Topology"), child(grid, "Geometry")
    assert topology.attrib == {"TopologyType": f"{header.ndim}DCoRectMesh", "Dimensions": " ".join(map(str, header.grid_shape))}
    assert geometry.attrib["GeometryType"] == ("ORIGIN_DXDYDZ" if header.ndim == 3 else "ORIGIN_DXDY")
    origin, spacing = ([float(word) for word in words(item)] for item in geometry)
    assert origin == [0.0] * header.ndim and tuple(spacing) == header.spacing


def test_three_channels_in_space_are_a_vector_too(tmp_path: Path) -> None:
    header = HEADERS[0]
    write_volume(tmp_path / "a.h5", header, numbers(header))
    root = ElementTree.parse(write_sidecar(tmp_path / "a.h5", header)).getroot()
    joins = root.findall("Domain/Grid/Grid/Attribute[@AttributeType='Vector']/DataItem[@ItemType='Function']")
    for sample, join in enumerate(joins):
        assert join.attrib == {"ItemType": "Function", "Function": "JOIN($0, $1, $2)", "Dimensions": "3 4 5 3"}
        vector = np.stack([hyperslab(item, tmp_path) for item in join], axis=-1)
        assert np.array_equal(vector, np.moveaxis(numbers(header)[sample], 0, -1))
    assert len(joins) == header.samples
    assert b"Vector" not in write_sidecar(tmp_path / "b.h5", HEADERS[1]).read_bytes()


def test_an_existing_sidecar_is_kept_unless_asked(tmp_path: Path) -> None:
    write_sidecar(tmp_path / "a.h5", HEADERS[0])
    with pytest.raises(UserError, match=r"a\.xdmf: exists already"):
        write_sidecar(tmp_path / "a.h5", HEADERS[0])
    assert write_sidecar(tmp_path / "a.h5", HEADERS[0], overwrite=True).exists()
