"""The file of a simulation does not depend on the number of ranks that made it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpatch.data.fields import FieldFile
from ddpatch.errors import UserError
from ddpatch.parallel.comm import Communicator
from ddpatch.simulate import simulate


def read(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    with FieldFile(path) as file:
        shape = file.header.grid_shape
        fields = [file.read(sample, (0,) * len(shape), shape) for sample in range(file.header.samples)]
        return np.stack(fields), dict(file.header.attributes)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(("kind", "variable"), [("isotropic", "velocity"), ("kolmogorov", "vorticity")])
def test_ranks_do_not_change_the_file(comm: Communicator, shared_path: Path, kind: str, variable: str) -> None:
    trajectories = comm.size + 1
    samples = 2 * trajectories + 1
    simulate(kind, shared_path / "all.h5", samples, 16, 3, trajectories, comm=comm, variable=variable)
    alone = comm.split(comm.rank)
    simulate(kind, shared_path / f"{comm.rank}.h5", samples, 16, 3, trajectories, comm=alone, variable=variable)
    alone.free()
    fields, attributes = read(shared_path / "all.h5")
    expected, expected_attributes = read(shared_path / f"{comm.rank}.h5")
    np.testing.assert_allclose(fields, expected, rtol=1e-6, atol=1e-6)
    assert attributes.keys() == expected_attributes.keys()
    for name, value in attributes.items():
        if isinstance(value, str):
            assert value == expected_attributes[name]
        else:
            np.testing.assert_allclose(value, expected_attributes[name], rtol=1e-9)


@pytest.mark.mpi(min_size=2)
def test_more_ranks_than_trajectories_are_refused_on_all_ranks(comm: Communicator, shared_path: Path) -> None:
    with pytest.raises(UserError, match=f"{comm.size} ranks for 1 trajectories"):
        simulate("isotropic", shared_path / "flow.h5", 6, 16, comm=comm)


@pytest.mark.mpi(min_size=2)
def test_existing_file_is_refused_on_all_ranks(comm: Communicator, shared_path: Path) -> None:
    path = shared_path / "flow.h5"
    comm.on_root(lambda: path.write_text("kept"))
    with pytest.raises(UserError, match="exists"):
        simulate("isotropic", path, comm.size, 16, trajectories=comm.size, comm=comm)
    assert path.read_text() == "kept"
