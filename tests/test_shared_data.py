"""Fields that other people computed or measured train: two steps each, with all the file's own names, types and walls."""

from __future__ import annotations

from pathlib import Path

import pytest
from problems import small_config

from ddpatch.__main__ import main
from ddpatch.data.fields import FieldFile

FILES = {
    "hit_fluidsim_128": {"data.name": "velocity", "domain.grid": "[16, 16, 16]", "domain.patch": "[8, 8, 16]"},
    "jhtdb_sapsan_small": {"data.name": "velocity_32", "domain.patch": "[16, 16, 16]"},
    "turb2d_py2d_512": {"data.name": "vorticity", "domain.grid": "[64, 64]", "domain.patch": "[16, 16]"},
    "porous_berea_ketton": {"data.name": "ketton", "domain.grid": "[32, 16, 16]", "domain.patch": "[16, 16, 16]"},
    "lcdm_density_128": {"data.name": "log_density_u8", "domain.grid": "[16, 16, 16]", "domain.patch": "[8, 8, 8]"},
    "sperr_turbulence_samples": {
        "data.name": "vorticity_magnitude_91",
        "domain.grid": "[14, 26, 26]",
        "domain.patch": "[14, 26, 26]",
    },
    "mnist": {"data.name": "train/images", "domain.patch": "[14, 14]", "model.tokens": "7", "train.steps": "1"},
}


@pytest.mark.parametrize("name", FILES)
def test_training_and_sampling(shared_data: Path, tmp_path: Path, name: str) -> None:
    data, config = shared_data / f"{name}.h5", tmp_path / "config.yaml"
    config.write_text(small_config(data, "float32", train={"steps": 2}, model={"tokens": 2}).as_yaml())
    overrides = [word for key, value in FILES[name].items() for word in ("--set", f"{key}={value}")]
    assert main(["train", str(config), "--run", str(tmp_path / "run"), *overrides]) == 0
    assert main(["sample", str(tmp_path / "run"), "--count", "1", "--output", str(tmp_path / "s.h5"), "--steps", "2"]) == 0
    with FieldFile(tmp_path / "s.h5") as samples, FieldFile(data, FILES[name]["data.name"]) as file:
        assert samples.header.channels == file.header.channels
        assert samples.header.spacing == pytest.approx(file.header.spacing)
