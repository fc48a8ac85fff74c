"""The three writers make the same file, for any number of ranks that the patches do not divide evenly."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import xarray

from ddpatch.data.fields import FieldFile
from ddpatch.decomposition import Decomposition
from ddpatch.errors import UserError
from ddpatch.io.gather import GatherWriter
from ddpatch.io.mpio import MpioWriter
from ddpatch.io.virtual import VirtualWriter
from ddpatch.io.volume import VolumeHeader
from ddpatch.io.writer import VolumeWriter
from ddpatch.io.writers import WRITERS, open_writer
from ddpatch.parallel.comm import Communicator

GRIDS = [((6, 4, 10), (2, 2, 5)), ((9, 12), (3, 4))]  # 3 x 2 x 2 and 3 x 3 patches
MODES = [
    "gather",
    "virtual",
    pytest.param("mpio", marks=pytest.mark.skipif(not h5py.get_config().mpi, reason="h5py without MPI")),
]
EVERY_MODE = pytest.mark.parametrize("mode", MODES)


def header_of(grid: tuple[int, ...], dtype: str = "float32") -> VolumeHeader:
    return VolumeHeader(2, ("u", "v"), grid, (0.5,) * len(grid), (True,) * len(grid), dtype, {"seed": 7})


def truth(header: VolumeHeader) -> np.ndarray:
    """Numbers that tell sample, channel and grid index: [sample, channel, *grid_shape]."""
    return np.arange(np.prod(header.shape), dtype=header.dtype).reshape(header.shape)


def local(values: np.ndarray, decomposition: Decomposition, rank: int) -> torch.Tensor:
    """A rank's patches, [local patch, channel, *patch_shape]."""
    boxes = [(slice(None), *decomposition.slices(patch)) for patch in decomposition.local_patches(rank)]
    return torch.from_numpy(np.stack([values[box] for box in boxes]))


def write(writer: VolumeWriter, scale: float = 1.0) -> None:
    with writer:
        for sample, values in enumerate(truth(writer.header)):
            writer.write(sample, scale * local(values, writer.decomposition, writer.comm.rank))


def read(path: Path) -> tuple[VolumeHeader, np.ndarray]:
    with FieldFile(path) as file:
        everything = [file.read(s, (0,) * file.header.ndim, file.header.grid_shape) for s in range(file.header.samples)]
        return file.header, np.stack(everything)


@pytest.mark.mpi(min_size=1)
@EVERY_MODE
@pytest.mark.parametrize(("grid", "patch"), GRIDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_written_is_read_back(
    comm: Communicator, shared_path: Path, mode: str, grid: tuple[int, ...], patch: tuple[int, ...], dtype: str
) -> None:
    header, path = header_of(grid, dtype), shared_path / "samples.h5"
    writer = open_writer(path, header, Decomposition(grid, patch, comm.size), comm, mode)
    assert type(writer) is WRITERS[mode] and not path.exists()
    write(writer)
    found, values = read(path)
    assert np.array_equal(values, truth(header)) and values.dtype == dtype
    assert found == replace(header, attributes=found.attributes) and found.attributes["seed"] == 7
    names = {path.name, f"{path.name}.ranks"} if mode == "virtual" else {path.name}
    assert {entry.name for entry in shared_path.iterdir()} == names


@pytest.mark.mpi(min_size=1)
@EVERY_MODE
def test_xarray_opens_the_file(comm: Communicator, shared_path: Path, mode: str) -> None:
    header, path = header_of((6, 4, 10)), shared_path / "samples.h5"
    write(open_writer(path, header, Decomposition((6, 4, 10), (2, 2, 5), comm.size), comm, mode))
    with xarray.open_dataset(path, engine="h5netcdf") as dataset:
        assert dataset.fields.dims == ("sample", "channel", "z", "y", "x")
        assert list(dataset.channel.values) == ["u", "v"] and list(dataset.y.values) == [0.0, 0.5, 1.0, 1.5]
        assert np.array_equal(dataset.fields.values, truth(header))


@pytest.mark.mpi(min_size=1)
def test_auto_chooses_what_fits_the_ranks_and_the_library(comm: Communicator, shared_path: Path) -> None:
    several = MpioWriter if h5py.get_config().mpi else VirtualWriter
    writer = open_writer(shared_path / "samples.h5", header_of((9, 12)), Decomposition((9, 12), (3, 4), comm.size), comm)
    assert type(writer) is (GatherWriter if comm.size == 1 else several)
    write(writer)


@pytest.mark.mpi(min_size=1)
@EVERY_MODE
def test_a_result_is_replaced_only_when_asked(comm: Communicator, shared_path: Path, mode: str) -> None:
    header, path, decomposition = header_of((9, 12)), shared_path / "samples.h5", Decomposition((9, 12), (3, 4), comm.size)
    write(open_writer(path, header, decomposition, comm, mode))
    for other in ("gather", "virtual", mode):
        with pytest.raises(UserError, match=r"samples\.h5: exists already"):
            open_writer(path, header, decomposition, comm, other)
    assert np.array_equal(read(path)[1], truth(header))
    comm.barrier()
    write(open_writer(path, header, decomposition, comm, mode, overwrite=True), scale=2.0)
    assert np.array_equal(read(path)[1], 2 * truth(header))
    comm.barrier()
    write(open_writer(path, header, decomposition, comm, "gather", overwrite=True), scale=3.0)
    assert np.array_equal(read(path)[1], 3 * truth(header))
    assert [entry.name for entry in shared_path.iterdir()] == [path.name]


@pytest.mark.mpi(min_size=1)
@EVERY_MODE
def test_a_failure_leaves_what_was_there(comm: Communicator, shared_path: Path, mode: str) -> None:
    header, path, decomposition = header_of((9, 12)), shared_path / "samples.h5", Decomposition((9, 12), (3, 4), comm.size)
    write(open_writer(path, header, decomposition, comm, mode))
    before = {entry.name for entry in shared_path.iterdir()}
    comm.barrier()
    with (
        pytest.raises(RuntimeError, match="solver"),
        open_writer(path, header, decomposition, comm, mode, overwrite=True) as writer,
    ):
        writer.write(0, local(-truth(header)[0], decomposition, comm.rank))
        raise RuntimeError("solver")
    comm.barrier()
    with pytest.raises(ValueError, match=r"samples \[1\] were not written"):
        writer = open_writer(path, header, decomposition, comm, mode, overwrite=True)
        writer.write(0, local(-truth(header)[0], decomposition, comm.rank))
        writer.close()
    comm.barrier()
    assert np.array_equal(read(path)[1], truth(header))
    assert {entry.name for entry in shared_path.iterdir()} == before


def begin(writer: VolumeWriter) -> None:
    """The first sample of a series that ends in a failure while the second is written."""
    first, second = truth(writer.header)
    with pytest.raises(RuntimeError, match="solver"), writer:
        writer.write(0, local(first, writer.decomposition, writer.comm.rank))
        writer.commit()
        writer.write(1, local(-second, writer.decomposition, writer.comm.rank))
        raise RuntimeError("solver")
    writer.comm.barrier()


@pytest.mark.mpi(min_size=1)
@EVERY_MODE
def test_a_series_goes_on_after_a_failure(comm: Communicator, shared_path: Path, mode: str) -> None:
    header, path, decomposition = header_of((9, 12)), shared_path / "samples.h5", Decomposition((9, 12), (3, 4), comm.size)
    begin(open_writer(path, header, decomposition, comm, mode))
    assert not path.exists()
    comm.barrier()
    with open_writer(path, header, decomposition, comm, mode) as writer:
        assert writer.finished == {0}
        writer.write(1, local(truth(header)[1], decomposition, comm.rank))
    assert np.array_equal(read(path)[1], truth(header))
    names = {path.name, f"{path.name}.ranks"} if mode == "virtual" else {path.name}
    assert {entry.name for entry in shared_path.iterdir()} == names


@pytest.mark.mpi(min_size=1)
@EVERY_MODE
def test_a_series_is_not_mixed_with_another_one(comm: Communicator, shared_path: Path, mode: str) -> None:
    header, path, decomposition = header_of((9, 12)), shared_path / "samples.h5", Decomposition((9, 12), (3, 4), comm.size)
    begin(open_writer(path, header, decomposition, comm, mode))
    other = replace(header, attributes={"seed": 8})
    with pytest.raises(UserError, match=r"samples\.h5: an unfinished series with 1 samples is here, with seed = 7, now 8"):
        open_writer(path, other, decomposition, comm, mode)
    comm.barrier()
    write(open_writer(path, other, decomposition, comm, "gather", overwrite=True))
    assert np.array_equal(read(path)[1], truth(header))
    assert {entry.name for entry in shared_path.iterdir()} == {path.name}


@pytest.mark.mpi(min_size=2)
def test_a_series_goes_on_with_another_number_of_ranks(comm: Communicator, shared_path: Path) -> None:
    """Where all ranks write into one file; a file per rank is refused with both numbers."""
    header, alone = header_of((9, 12)), comm.split(comm.rank)
    for mode in ("gather", "virtual"):
        path = shared_path / f"{mode}.h5"
        if comm.rank == 0:  # the others wait below
            begin(open_writer(path, header, Decomposition((9, 12), (3, 4), 1), alone, mode))
        comm.barrier()
        decomposition = Decomposition((9, 12), (3, 4), comm.size)
        if mode == "virtual":
            with pytest.raises(UserError, match=rf"with ranks = 1, now {comm.size}"):
                open_writer(path, header, decomposition, comm, mode)
            continue
        with open_writer(path, header, decomposition, comm, mode) as writer:
            assert writer.finished == {0}
            writer.write(1, local(truth(header)[1], decomposition, comm.rank))
        assert np.array_equal(read(path)[1], truth(header))


@pytest.mark.mpi(min_size=1)
def test_a_line_of_the_journal_that_was_cut_is_not_believed(comm: Communicator, shared_path: Path) -> None:
    header, path, decomposition = header_of((9, 12)), shared_path / "samples.h5", Decomposition((9, 12), (3, 4), comm.size)
    begin(open_writer(path, header, decomposition, comm, "gather"))

    def cut() -> None:
        journal = shared_path / ".samples.h5.journal"
        assert journal.read_text().endswith("[0]\n")
        journal.write_text(journal.read_text()[:-1])

    comm.on_root(cut)
    writer = open_writer(path, header, decomposition, comm, "gather")
    assert writer.finished == set()
    write(writer)
    assert np.array_equal(read(path)[1], truth(header))


@pytest.mark.mpi(min_size=1)
def test_a_virtual_file_moves_with_its_folder_and_misses_no_file_silently(comm: Communicator, shared_path: Path) -> None:
    header, path, decomposition = header_of((9, 12)), shared_path / "samples.h5", Decomposition((9, 12), (3, 4), comm.size)
    write(open_writer(path, header, decomposition, comm, "virtual"))
    moved, lost = shared_path / "elsewhere" / path.name, f"rank_{comm.size - 1:05d}.h5"

    def move() -> None:
        moved.parent.mkdir()
        for entry in list(shared_path.glob("samples*")):
            shutil.move(entry, moved.parent)

    comm.on_root(move)
    assert np.array_equal(read(moved)[1], truth(header))
    comm.barrier()
    comm.on_root(lambda: (moved.parent / "samples.h5.ranks" / lost).unlink())
    with pytest.raises(UserError, match=rf"refers to the file .*samples\.h5\.ranks/{lost}, which is missing"):
        FieldFile(moved)
    with h5py.File(moved) as file:
        assert np.isnan(file["fields"][0, 0, -1, -1])


@pytest.mark.mpi(min_size=1)
@pytest.mark.skipif(h5py.get_config().mpi, reason="h5py with MPI")
def test_mpio_is_refused_without_parallel_hdf5(comm: Communicator, shared_path: Path) -> None:
    with pytest.raises(UserError, match=r"output\.mode: mpio needs an h5py that was built with MPI"):
        open_writer(shared_path / "samples.h5", header_of((9, 12)), Decomposition((9, 12), (3, 4), comm.size), comm, "mpio")
    assert not list(shared_path.iterdir())


@pytest.mark.mpi(min_size=1)
def test_an_unknown_mode_and_wrong_shapes_are_refused(comm: Communicator, shared_path: Path) -> None:
    header, decomposition = header_of((9, 12)), Decomposition((9, 12), (3, 4), comm.size)
    with pytest.raises(UserError, match="expected auto, gather, virtual, mpio, got 'virtul', did you mean 'virtual'"):
        open_writer(shared_path / "samples.h5", header, decomposition, comm, "virtul")
    with pytest.raises(ValueError, match="do not belong together"):
        open_writer(shared_path / "samples.h5", header_of((9, 8)), decomposition, comm)
    with (
        pytest.raises(ValueError, match="patches of shape"),
        open_writer(shared_path / "samples.h5", header, decomposition, comm, "gather") as writer,
    ):
        writer.write(0, torch.zeros(len(decomposition.local_patches(comm.rank)), 1, 3, 4))
