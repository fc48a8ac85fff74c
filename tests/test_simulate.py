"""The verb ``simulate``: its file, its provenance, and its answers to mistakes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpatch.data.fields import FieldFile
from ddpatch.errors import UserError
from ddpatch.parallel.comm import Communicator
from ddpatch.simulate import simulate


def read(path: Path) -> tuple[np.ndarray, Any]:
    with FieldFile(path) as file:
        header = file.header
        shape = header.grid_shape
        return np.stack([file.read(sample, (0,) * len(shape), shape) for sample in range(header.samples)]), header


def divergence(fields: np.ndarray) -> float:
    """Spectral ∂u/∂x + ∂v/∂y (+ ∂w/∂z) of fields [sample, channel, (z,) y, x], relative to the root mean square gradient."""
    ndim = fields.ndim - 2
    axes = tuple(range(-ndim, 0))
    modes = np.fft.fftn(fields, axes=axes)
    total, square = np.zeros(1, complex), 0.0
    for channel in range(ndim):
        k = np.fft.fftfreq(fields.shape[-1], 1 / fields.shape[-1]).reshape(-1, *[1] * channel)
        total = total + k * modes[:, channel]
        square += float((np.abs(k * modes[:, channel]) ** 2).mean())
    return float(np.sqrt((np.abs(total) ** 2).mean() / square))


def test_isotropic_file(tmp_path: Path, comm: Communicator) -> None:
    path = tmp_path / "flow.h5"
    heard: list[tuple[int, int]] = []
    simulate("isotropic", path, 3, 16, seed=5, trajectories=2, comm=comm, progress=lambda *told: heard.append(told))
    fields, header = read(path)
    assert header.channels == ("u", "v", "w")
    assert fields.shape == (3, 3, 16, 16, 16) and fields.dtype == np.float32
    assert header.spacing == pytest.approx((2 * math.pi / 16,) * 3) and header.periodic == (True, True, True)
    assert divergence(fields) < 1e-6
    assert abs(fields.mean((2, 3, 4))).max() < 1e-6
    attributes = header.attributes
    energy = 0.5 * (fields.astype(float) ** 2).sum(1).mean()
    assert attributes["energy"] == pytest.approx(energy, rel=1e-5)
    assert attributes["seed"] == 5 and attributes["power"] == 0.1
    assert attributes["viscosity"] == pytest.approx(((1.3 * 3 / 16) ** 4 * 0.1) ** (1 / 3))
    assert list(attributes["trajectory"]) == [0, 0, 1]
    assert attributes["time"][1] - attributes["time"][0] == pytest.approx(attributes["time_spacing"])
    assert attributes["time"][2] == attributes["time"][0]
    assert {"equations", "solver", "forcing", "eddy_turnover_time", "reynolds_lambda", "ddpatch_version"} <= set(attributes)
    total = heard[-1][1]
    assert heard == [(done, total) for done in range(1, total + 1)]


def test_seed_and_trajectory_name_the_flow(tmp_path: Path, comm: Communicator) -> None:
    def fields(name: str, samples: int, seed: int) -> np.ndarray:
        simulate("isotropic", tmp_path / name, samples, 16, seed=seed, trajectories=samples, comm=comm)
        return read(tmp_path / name)[0]

    three, two, other = fields("three", 3, 0), fields("two", 2, 0), fields("other", 1, 1)
    np.testing.assert_array_equal(two, three[:2])
    for a, b in ((three[0], three[1]), (three[0], other[0])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.5


def test_kolmogorov_velocity_and_vorticity_are_of_the_same_flow(tmp_path: Path, comm: Communicator) -> None:
    simulate("kolmogorov", tmp_path / "u.h5", 2, 32, comm=comm)
    simulate("kolmogorov", tmp_path / "w.h5", 2, 32, comm=comm, variable="vorticity")
    velocity, header = read(tmp_path / "u.h5")
    vorticity, _ = read(tmp_path / "w.h5")
    assert header.channels == ("u", "v") and velocity.shape == (2, 2, 32, 32) and vorticity.shape == (2, 1, 32, 32)
    assert divergence(velocity) < 1e-6
    k = np.fft.fftfreq(32, 1 / 32)
    modes = np.fft.fft2(velocity)
    curl = np.fft.ifft2(1j * k * modes[:, 1] - 1j * k[:, None] * modes[:, 0]).real
    np.testing.assert_allclose(curl, vorticity[:, 0], atol=1e-5)
    assert header.attributes["enstrophy"] == pytest.approx(0.5 * (vorticity**2).mean(), rel=1e-5)


def test_existing_file_is_kept_unless_overwrite(tmp_path: Path, comm: Communicator) -> None:
    path = tmp_path / "flow.h5"
    simulate("kolmogorov", path, 1, 16, comm=comm)
    before = path.read_bytes()
    with pytest.raises(UserError, match="exists"):
        simulate("kolmogorov", path, 1, 16, seed=1, comm=comm)
    assert path.read_bytes() == before
    simulate("kolmogorov", path, 1, 16, seed=1, comm=comm, overwrite=True, viscosity=0.2)
    assert read(path)[1].attributes["viscosity"] == 0.2
    assert [item.name for item in tmp_path.iterdir()] == ["flow.h5"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "isotropc"}, "did you mean 'isotropic'"),
        ({"grid": 33}, "grid 33, expected an even number"),
        ({"grid": 8}, "at least 16"),
        ({"samples": 0}, "0 samples"),
        ({"trajectories": 3}, "3 trajectories, expected 1 to 2"),
        ({"viscosity": -1.0}, "viscosity -1.0"),
        ({"viscosity": math.nan}, "viscosity nan"),
        ({"variable": "vorticity"}, "'vorticity' of isotropic flow, expected velocity"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, comm: Communicator, changes: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"kind": "isotropic", "samples": 2, "grid": 32} | changes
    with pytest.raises(UserError, match=words):
        simulate(output=tmp_path / "flow.h5", comm=comm, **arguments)
    assert not list(tmp_path.iterdir())
