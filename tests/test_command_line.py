"""What the user sees: results of the verbs, and one line with exit code 2 for every mistake."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from problems import small_config, write_fields

from ddpatch.__main__ import main
from ddpatch.data.fields import FieldFile


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fields(tmp_path_factory.mktemp("data") / "data.h5")


@pytest.fixture(scope="module")
def config(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(small_config(data, "float32").as_yaml())
    return path


@pytest.fixture(scope="module")
def run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    assert main(["train", str(config), "--run", str(folder)]) == 0
    return folder


def mistake(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line that a mistake prints."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ddpatch: error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("ddpatch: error: ")


def test_train_sample_evaluate(run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = tmp_path / "samples.h5"
    assert main(["sample", str(run), "--count", "3", "--output", str(samples), "--steps", "4", "--solver", "heun"]) == 0
    with FieldFile(samples) as file:
        assert file.header.shape == (3, 2, 16, 24)
        assert file.header.channels == ("u", "v")
    assert samples.with_suffix(".xdmf").exists()
    report = tmp_path / "report"
    assert main(["evaluate", str(samples), "--reference", str(data), "--output", str(report)]) == 0
    assert json.loads((report / "metrics.json").read_text())["headline"]
    assert "report.html" in capsys.readouterr().out


def test_the_log_has_a_row_per_interval(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["samples_seen"] for row in rows] == [2, 4, 6, 8, 10]
    keys = {"loss", "voxels_per_rank_second", "communication", "input", "peak_memory_gib"}
    assert all(keys <= set(row) and all(np.isfinite(row[key]) for key in keys) for row in rows)


def test_train_continues_an_existing_run(run: Path, config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    assert main(["train", str(config), "--run", str(folder), "--set", "train.steps=7"]) == 0
    assert [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6, 7]


def test_samples_of_another_grid(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "wide.h5"
    assert main(["sample", str(run), "--count", "1", "--output", str(output), "--steps", "2", "--grid", "24", "32"]) == 0
    with FieldFile(output) as file:
        assert file.header.grid_shape == (24, 32)


def test_sample_k_does_not_depend_on_how_many_are_drawn(run: Path, tmp_path: Path) -> None:
    fields = []
    for count in (2, 3):
        output = tmp_path / f"{count}.h5"
        assert main(["sample", str(run), "--count", str(count), "--output", str(output), "--steps", "2"]) == 0
        with FieldFile(output) as file:
            fields.append(file.read(1, (0, 0), (16, 24)))
    np.testing.assert_allclose(fields[0], fields[1], rtol=1e-4, atol=1e-4)


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("ddpatch", "torch", "MPI library", "parallel HDF5", "GPUs"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.chanels=[8]", "unknown key 'model.chanels', did you mean 'channels'?"),
        ("domain.patch=[5, 8]", "domain.patch: [5, 8] does not divide domain.grid [16, 24]"),
        ("domain.patch=[8, 8, 8]", "must have the same number of axes"),
        ("domain.grid=[64, 64]", "domain.grid: [64, 64] does not fit into the fields of"),
        ("domain.grid=[8, 8]", None),
        ("model.tokens=3", "3 tokens per axis do not divide the patch [8, 8]"),
        ("model.halo=9", "9 points are wider than the patch"),
        ("data.path=absent.h5", "absent.h5: no such file"),
        ("data.name=velocity", "no dataset 'velocity'"),
        ("data.axes=z y x", "axes"),
        ("data.holdout=6", "data.holdout: 6 leaves none of the 6 samples"),
    ],
)
def test_mistakes_in_a_configuration(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str | None
) -> None:
    argv = ["train", str(config), "--run", str(tmp_path / "run"), "--set", override]
    if message is None:
        assert main([*argv, "--set", "train.steps=1"]) == 0
        return
    assert message in mistake(capsys, *argv)
    assert not (tmp_path / "run").exists()


def test_numbers_that_are_not_finite_are_located(
    config: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.h5"
    shutil.copy(data, broken)
    with h5py.File(broken, "r+") as file:
        file["fields"][2, 1, 5, 7] = np.nan
    line = mistake(capsys, "train", config, "--run", tmp_path / "run", "--set", f"data.path={broken}")
    assert str(broken) in line and "sample 2, channel 1, grid index [5, 7]" in line


def test_another_configuration_does_not_continue_a_run(run: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = mistake(capsys, "train", config, "--run", run, "--set", "train.learning_rate=0.5")
    assert "train.learning_rate = 0.005, the configuration has 0.5" in line


def test_existing_samples_are_not_replaced_unasked(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "samples.h5"
    output.write_text("precious")
    assert str(output) in mistake(capsys, "sample", run, "--count", 1, "--output", output)
    assert output.read_text() == "precious"
    assert main(["sample", str(run), "--count", "1", "--output", str(output), "--steps", "1", "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sample", "RUN", "--count", "1", "--output", "OUT", "--grid", "20", "24"], "[8, 8] does not divide"),
        (["sample", "RUN", "--count", "1", "--output", "OUT", "--grid", "16"], "the run has 2 axes"),
        (["sample", "RUN", "--count", "0", "--output", "OUT"], "--count 0"),
        (["sample", "RUN", "--count", "1", "--output", "OUT", "--solver", "euler"], "expected one of heun, dpm++2m, got 'euler'"),
        (["sample", "RUN", "--count", "1", "--output", "OUT", "--mode", "zarr"], "output.mode"),
        (["sample", "absent", "--count", "1", "--output", "OUT"], "absent: no checkpoint"),
        (["sample", "RUN", "--count", "many", "--output", "OUT"], "--count: invalid int value: 'many'"),
        (["evaluate", "absent.h5", "--reference", "absent.h5", "--output", "OUT"], "absent.h5: no such file"),
        (["simulate", "isotropic", "--output", "OUT", "--grid", "7"], "grid 7"),
        (["simulate", "channel", "--output", "OUT"], "unknown kind 'channel'"),
        (["trian"], "invalid choice: 'trian'"),
        ([], "VERB"),
    ],
)
def test_mistakes_on_the_command_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    words = {"RUN": str(run), "OUT": str(tmp_path / "out.h5")}
    assert message in mistake(capsys, *(words.get(word, word) for word in argv))
    assert not (tmp_path / "out.h5").exists()


def test_what_was_trained_cannot_be_overridden_when_it_is_sampled(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = mistake(capsys, "sample", run, "--count", 1, "--output", tmp_path / "out.h5", "--set", "model.halo=2")
    assert "--set model.halo=2: expected a key of sample, output, parallel, execution" in line


def test_a_checkpoint_of_another_model_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from ddpatch.io.seal import seal

    folder = tmp_path / "other"
    shutil.copytree(run, folder)
    path = next(folder.glob("checkpoint_*.pt"))
    state = torch.load(path, weights_only=True)
    state["config"]["model"]["channels"] = [8, 16]
    torch.save(state, path)
    seal(path)
    line = mistake(capsys, "sample", folder, "--count", 1, "--output", tmp_path / "out.h5")
    assert "checkpoint of another model" in line and str(path) in line


def test_a_launcher_of_another_mpi_is_refused() -> None:
    """What N processes that each believe to be alone look like to one of them."""
    environment = {**os.environ, "PMI_SIZE": "4"} if "Open MPI" in _library() else {**os.environ, "OMPI_COMM_WORLD_SIZE": "4"}
    done = subprocess.run(
        [sys.executable, "-m", "ddpatch", "info"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "started 4 processes" in done.stderr and "Traceback" not in done.stderr


def test_the_configurations_that_are_shipped_are_valid() -> None:
    from ddpatch.config import load

    paths = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))
    assert paths
    for path in paths:
        load(path)
        assert yaml.safe_load(path.read_text())


def _library() -> str:
    from ddpatch.parallel.comm import mpi_library

    return mpi_library()
