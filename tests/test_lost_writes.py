"""Killed while sampling, a full disk, a folder that may not be written any more: a line, and nothing that was there is lost."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from problems import small_config, write_fields

from ddpatch.config import load
from ddpatch.parallel.comm import Communicator
from ddpatch.train import train
from jobs import NEEDS_MPIEXEC, launch, script

pytestmark = NEEDS_MPIEXEC
NOBODY = 65534


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(small_config(write_fields(folder / "data.h5"), "float32", train={"steps": 2}), folder / "run", Communicator())
    return folder / "run"


def sampling(run: Path, output: Path, before: str = "") -> str:
    """A job that draws six samples in batches of two, and prints the first sample of every batch."""
    return (
        "import os, resource, signal\nfrom pathlib import Path\nfrom ddpatch.sample import Sampler, sample\n"
        "known = Sampler.draw\n"
        "def draw(self, samples, *rest):\n"
        f"    os.write(1, f'drawn {{samples[0]}}\\n'.encode())\n{before}"
        "    return known(self, samples, *rest)\n"
        "Sampler.draw = draw\n"
        f"sample(Sampler(Path({str(run)!r}), comm), Path({str(output)!r}), 6, steps=2)"
    )


def fields(path: Path) -> np.ndarray:
    with h5py.File(path) as file:
        return np.asarray(file["fields"][:])


def test_a_killed_sampling_goes_on_with_the_samples_that_are_missing(tmp_path: Path, run: Path) -> None:
    whole, output = tmp_path / "whole.h5", tmp_path / "samples.h5"
    assert launch(2, script(tmp_path, sampling(run, whole)))[0].returncode == 0
    kill = "    if samples[0] == 4 and comm.rank == 1:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
    assert launch(2, script(tmp_path, sampling(run, output, kill)))[0].returncode != 0
    assert not output.exists()
    done, _ = launch(2, script(tmp_path, sampling(run, output)))
    assert done.returncode == 0 and done.stdout.split() == ["drawn", "4"] * 2
    assert np.array_equal(fields(output), fields(whole))
    assert not list(tmp_path.glob(".*"))


def test_notice_to_one_rank_leaves_with_the_finished_samples(tmp_path: Path, run: Path) -> None:
    output = tmp_path / "samples.h5"
    notice = "    if samples[0] == 2 and comm.rank == 1:\n        os.kill(os.getpid(), signal.SIGUSR1)\n"
    done, _ = launch(2, script(tmp_path, sampling(run, output, notice)))
    assert done.returncode == 75 and "left on notice with 4 of 6 samples; the same command goes on" in done.stderr
    done, _ = launch(2, script(tmp_path, sampling(run, output)))
    assert done.returncode == 0 and done.stdout.split() == ["drawn", "4"] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_under_one_rank_is_one_line_and_harms_no_file(tmp_path: Path, run: Path, rank: int) -> None:
    """The system refuses to let that rank's files grow, in the middle of a second series."""
    output = tmp_path / "samples.h5"
    assert launch(2, script(tmp_path, sampling(run, output)))[0].returncode == 0
    before = fields(output)
    full = f"    if comm.rank == {rank}:\n        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
    job = sampling(run, output, full).replace("steps=2", "steps=3, overwrite=True")
    done, _ = launch(2, script(tmp_path, job))
    assert done.returncode == 2 and f"{output}: cannot write" in done.stderr and f"on rank {rank}" in done.stderr
    assert "Traceback" not in done.stderr
    assert np.array_equal(fields(output), before)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that another user can reach."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


@pytest.mark.parametrize(("log_every", "every", "what"), [(1, 2, "cannot write the log"), (3, 1, "no permission to write")])
def test_lost_permission_to_write_ends_a_training_with_a_line(open_folder: Path, log_every: int, every: int, what: str) -> None:
    """The checkpoints before it are there, and the run goes on from them."""
    train_section: dict[str, object] = {"steps": 50, "checkpoint_every": every, "log_every": log_every}
    config = small_config(write_fields(open_folder / "data.h5"), train=train_section)
    (open_folder / "config.yaml").write_text(config.as_yaml())
    job = (
        "import os\nfrom pathlib import Path\nfrom ddpatch.config import load\nfrom ddpatch.train import train\n"
        f"folder = Path({str(open_folder / 'run')!r})\n"
        "def progress(row):\n    if row['step'] == 3:\n"
        "        while (folder / 'latest').resolve().name != 'checkpoint_00000002.pt':\n            time.sleep(0.01)\n"
        "        folder.chmod(0o555)\n"
        f"        os.geteuid() or os.setuid({NOBODY})\n"  # permissions do not bind root
        f"train(load({str(open_folder / 'config.yaml')!r}), folder, comm, progress)"
    )
    done, _ = launch(2, script(open_folder, job))
    assert done.returncode == 2 and what in done.stderr
    assert "Traceback" not in done.stderr and str(open_folder / "run") in done.stderr
    (open_folder / "run").chmod(0o777)
    assert {path.name for path in (open_folder / "run").glob("checkpoint_*")} >= {"checkpoint_00000002.pt"}
    (open_folder / "config.yaml").write_text(config.as_yaml().replace("steps: 50", "steps: 5"))
    train(load(open_folder / "config.yaml"), open_folder / "run", Communicator())
    assert (open_folder / "run" / "latest").resolve().name == "checkpoint_00000005.pt"
