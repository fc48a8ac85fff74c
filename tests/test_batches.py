from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from problems import small_config, smooth_fields, write_fields

from ddpatch.data.batches import PatchBatches, check_grid
from ddpatch.data.fields import FieldFile
from ddpatch.data.normalisation import Normalisation, measure_normalisation
from ddpatch.decomposition import Decomposition
from ddpatch.errors import UserError
from ddpatch.io.volume import VolumeHeader, write_volume
from ddpatch.parallel.comm import Communicator
from ddpatch.run import measure_field, resolve

UNIT = Normalisation((0.0, 0.0), (1.0, 1.0))
GRID = (16, 24)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fields(tmp_path_factory.mktemp("data") / "data.h5", samples=5)


def batches(file: FieldFile, grid: tuple[int, ...] = GRID, seed: int = 0, shift: bool = True) -> PatchBatches:
    decomposition = Decomposition(grid, (8, 8))
    return PatchBatches(file, range(5), decomposition, range(decomposition.num_patches), UNIT, seed, shift)


def test_every_epoch_sees_every_sample_once_in_another_order(path: Path) -> None:
    with FieldFile(path) as file:
        reader = batches(file)
        epochs = [[reader.sample(draw) for draw in range(5 * e, 5 * e + 5)] for e in range(4)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_draw_is_the_shifted_sample_cut_into_patches(path: Path) -> None:
    with FieldFile(path) as file:
        reader = batches(file)
        for draw in range(6):
            whole = np.roll(file.read(reader.sample(draw), (0, 0), GRID), [-o for o in reader.origin(draw)], axis=(1, 2))
            read = reader.read([draw], torch.float64)[0]
            for patch in range(6):
                expected = whole[(slice(None), *reader.decomposition.slices(patch))]
                np.testing.assert_array_equal(read[patch].numpy(), expected)


def test_crops_have_random_corners_that_fit(path: Path) -> None:
    with FieldFile(path) as file:
        corners = {batches(file, (8, 16)).origin(draw) for draw in range(50)}
        assert len(corners) > 20
        assert batches(file, (8, 16), shift=False).origin(3) == (0, 0)


def test_normalised_fields_have_unit_deviation(path: Path) -> None:
    comm = Communicator()
    fields = torch.from_numpy(smooth_fields(5, 2, GRID)) * torch.tensor([3.0, 0.5])[:, None, None] + 7
    with FieldFile(write_scaled(path.with_name("scaled.h5"), fields)) as file:
        channel = measure_normalisation(file, range(5), "channel", comm)
        joint = measure_normalisation(file, range(5), "joint", comm)
    normalised = channel.normalise(fields[:, None]).transpose(0, 2).flatten(1)
    torch.testing.assert_close(normalised.mean(1), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalised.std(1, correction=0), torch.ones(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(channel.restore(channel.normalise(fields[:, None])), fields[:, None])
    assert joint.std[0] == joint.std[1] == pytest.approx((np.square(channel.std).mean()) ** 0.5)


def write_scaled(path: Path, fields: torch.Tensor) -> Path:
    header = VolumeHeader(5, ("a", "b"), GRID, (1.0, 1.0), (True, True))
    write_volume(path, header, (field.numpy() for field in fields))
    return path


def test_a_constant_channel_is_refused(tmp_path: Path) -> None:
    fields = torch.from_numpy(smooth_fields(5, 2, GRID))
    fields[:, 1] = 3.0
    with FieldFile(write_scaled(tmp_path / "flat.h5", fields)) as file, pytest.raises(UserError, match="channel 'b' is constant"):
        measure_normalisation(file, range(5), "joint", Communicator())


@pytest.mark.parametrize(
    ("grid", "periodic", "message"),
    [
        ((32, 24), (True, True), "does not fit into the fields"),
        ((16, 24, 8), (True, True, True), "does not fit into the fields"),
        ((16, 24), (False,), r"domain.periodic: expected 2 values, one per axis, got \[False\]"),
        ((8, 24), (True, True), "axis 0 cannot be periodic, it covers 8 of the 16 points"),
    ],
)
def test_grids_that_the_file_cannot_fill_are_refused(
    path: Path, grid: tuple[int, ...], periodic: tuple[bool, ...], message: str
) -> None:
    with FieldFile(path) as file, pytest.raises(UserError, match=message):
        check_grid(file, grid, periodic)


def test_the_configuration_takes_grid_and_walls_from_the_data(path: Path) -> None:
    with FieldFile(path) as file:
        whole = resolve(small_config(path), file).domain
        crop = resolve(small_config(path, domain={"grid": [16, 8]}), file).domain
    assert (whole.grid, whole.periodic) == ((16, 24), (True, True))
    assert (crop.grid, crop.periodic) == ((16, 8), (True, False))


def test_the_range_of_noise_levels_covers_the_spectrum(path: Path) -> None:
    with FieldFile(path) as file:
        field = measure_field(resolve(small_config(path), file), file, Communicator())
    k = np.meshgrid(*[np.fft.fftfreq(n) * n for n in GRID], indexing="ij")
    spectrum = (1 + sum(a**2 for a in k) / 4) ** -2.0
    deviation = np.sqrt(spectrum / spectrum.mean())
    assert 5 * deviation.max() * 0.6 < field.sigma_max < 10 * deviation.max()
    assert 0.1 * deviation[0, 5] < field.sigma_min < 0.25 * deviation[0, 5]


def test_statistics_are_of_all_samples_where_grids_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """96 samples fit into 2^22 points; where they do not, every second one keeps to at most 64."""
    path = write_fields(tmp_path / "data.h5", samples=96)
    with FieldFile(path) as file:
        config, u = resolve(small_config(path), file), np.stack([file.read(k, (0, 0), GRID) for k in range(96)])
        whole = measure_field(config, file, Communicator())
        monkeypatch.setattr("ddpatch.run.MEASURED_POINTS", 0)
        picked = measure_field(config, file, Communicator())
    assert whole.normalisation.mean == pytest.approx(u.mean((0, 2, 3)), abs=1e-5)
    assert picked.normalisation.mean == pytest.approx(u[::2].mean((0, 2, 3)), abs=1e-5)
