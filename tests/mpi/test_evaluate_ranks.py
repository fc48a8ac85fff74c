"""An evaluation on several ranks has the figures of one rank, more ranks than rows included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpatch.data.fields import FieldFile
from ddpatch.errors import UserError
from ddpatch.evaluate import compare_fields, evaluate
from ddpatch.io.volume import VolumeHeader, write_volume
from ddpatch.parallel.comm import Communicator
from ddpatch.statistics import slabs
from ddpatch.statistics.spectrum import mode_deviation

pytestmark = pytest.mark.mpi
CASES = pytest.mark.parametrize(
    ("grid", "channels", "patch", "periodic"),
    [((6, 7, 10), 3, (3, 7, 5), True), ((4, 9), 2, (4, 3), False), ((12, 9), 1, (4, 3), True), ((6, 8, 4), 1, (3, 4, 2), False)],
    ids=["velocity3d", "velocity2d-walls", "scalar2d", "scalar3d-walls"],
)


def write(path: Path, comm: Communicator, grid: tuple[int, ...], channels: int, periodic: bool, seed: int) -> Path:
    ndim = len(grid)
    header = VolumeHeader(3, tuple("abc"[:channels]), grid, (0.5,) * ndim, (periodic,) * ndim, "float64")
    fields = np.random.default_rng(seed).standard_normal(header.shape) + 3.0
    comm.on_root(lambda: write_volume(path, header, fields))
    return path


def flattened(tree: Any, name: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {key: value for k, branch in tree.items() for key, value in flattened(branch, f"{name}.{k}").items()}
    if isinstance(tree, list):
        return {key: value for k, branch in enumerate(tree) for key, value in flattened(branch, f"{name}[{k}]").items()}
    return {name: tree}


@CASES
def test_figures_do_not_depend_on_the_ranks(
    comm: Communicator,
    shared_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    grid: tuple[int, ...],
    channels: int,
    patch: tuple[int, ...],
    periodic: bool,
) -> None:
    paths = [write(shared_path / f"{seed}.h5", comm, grid, channels, periodic, seed) for seed in (1, 2)]
    alone = comm.split(comm.rank)
    with FieldFile(paths[0]) as generated, FieldFile(paths[1]) as reference:
        monkeypatch.setattr(slabs, "PIECE_VALUES", 2 * channels * 7)  # several pieces per rank
        found = flattened(compare_fields(generated, reference, comm, patch).as_dict())
        monkeypatch.setattr(slabs, "PIECE_VALUES", 2**20)
        expected = flattened(compare_fields(generated, reference, alone, patch).as_dict())
    alone.free()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == (pytest.approx(value, rel=1e-10, abs=1e-12) if isinstance(value, float) else value), key


def test_mode_deviation_does_not_depend_on_the_ranks(comm: Communicator, shared_path: Path) -> None:
    path = write(shared_path / "u.h5", comm, (5, 6, 7), 2, True, 3)
    alone = comm.split(comm.rank)
    with FieldFile(path) as file:
        for grid in (None, (3, 6, 5)):
            found, expected = (mode_deviation(file, [0, 2], ranks, grid, std=np.ones(2)) for ranks in (comm, alone))
            for a, b in zip(found, expected, strict=True):
                assert a.numpy() == pytest.approx(b.numpy(), rel=1e-10)
    alone.free()


@pytest.mark.mpi(min_size=2)
def test_no_rank_reads_a_whole_field(comm: Communicator, shared_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(shared_path / "u.h5", comm, (32, 16), 1, True, 4)
    boxes = []
    read = FieldFile.read

    def recorded(self: FieldFile, sample: int, start: Any, shape: Any, channels: Any = None) -> np.ndarray:
        boxes.append(int(np.prod(shape)))
        return read(self, sample, start, shape, channels)

    monkeypatch.setattr(FieldFile, "read", recorded)
    with FieldFile(path) as file:
        compare_fields(file, file, comm, (8, 8))
    assert 0 < max(boxes) <= -(-32 // comm.size) * 16 + 2 * 16


def test_every_rank_gets_the_metrics_and_one_report_is_written(comm: Communicator, shared_path: Path) -> None:
    path = write(shared_path / "u.h5", comm, (6, 8), 1, True, 5)
    metrics = evaluate(path, path, shared_path / "out", comm, patch=(3, 4))
    assert comm.gather(metrics) == [metrics] * comm.size
    assert {item.suffix for item in (shared_path / "out").iterdir()} == {".json", ".png", ".html"}
    with pytest.raises(UserError, match="exists already"):
        evaluate(path, path, shared_path / "out", comm)
