"""The batch scripts in a real SLURM of one node: a training that is pre-empted and queued again, samples, and a scaling report.

Not part of ``pytest tests``: tests/run.sh runs it as a leg of its own, with an environment whose mpi4py uses Open MPI.
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import h5py
import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from cluster import cluster  # noqa: E402
from problems import small_config, write_fields  # noqa: E402

REPOSITORY = Path(__file__).parents[2]
STEPS = 200


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, cluster(Path(folder)) as environment:
        yield environment


@pytest.fixture
def config(tmp_path: Path) -> Path:
    settings: dict[str, object] = {"steps": STEPS, "checkpoint_every": 10**6, "log_every": 1}
    path = tmp_path / "config.yaml"
    tree = small_config(write_fields(tmp_path / "data.h5"), "float32", train=settings, parallel={"deterministic": True})
    path.write_text(tree.as_yaml())
    return path


def command(slurm: dict[str, str], *line: str) -> str:
    return subprocess.run(line, env=slurm, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def submit(slurm: dict[str, str], output: Path, exported: dict[str, object], script: str, *options: str) -> str:
    """Submit one of jobs/ on two ranks; returns the number of the job."""
    shape = ["--nodes=1", "--ntasks=2", "--ntasks-per-node=2", "--cpus-per-task=1", f"--output={output}", f"--chdir={REPOSITORY}"]
    variables = ",".join(f"{key}={value}" for key, value in {**exported, "VENV": sys.prefix}.items())
    line = ["sbatch", "--parsable", *shape, f"--export=ALL,{variables}", str(REPOSITORY / "jobs" / script), *options]
    return command(slurm, *line)


def read(output: Path) -> str:
    """What a job has printed so far, perhaps up to the middle of a character."""
    return output.read_text(errors="replace")


def finish(slurm: dict[str, str], job: str, output: Path) -> None:
    """Wait until a job has ended, as it should."""

    def state() -> str:
        facts = command(slurm, "scontrol", "--oneliner", "show", "job", job).split()
        return next(fact.partition("=")[2] for fact in facts if fact.startswith("JobState="))

    wait(lambda: state() not in ("PENDING", "RUNNING", "COMPLETING"), f"the end of job {job}")
    assert state() == "COMPLETED", read(output)


def wait(condition: Callable[[], bool], what: str, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.2)


def test_a_run_that_is_preempted_twice_ends_as_if_nothing_had_happened(
    slurm: dict[str, str], config: Path, tmp_path: Path
) -> None:
    """Once by the early signal, upon which the job queues itself again, and once by the batch system itself."""
    run, output = tmp_path / "run", tmp_path / "out"

    def rows() -> int:
        return len((run / "log.jsonl").read_text().splitlines()) if (run / "log.jsonl").exists() else 0

    def state() -> str:
        return command(slurm, "squeue", "--noheader", "--format=%T", f"--jobs={job}")

    def on_its_way() -> bool:
        """SLURM lets a job that was queued again wait for two minutes; an early request to start it now is overruled."""
        if state() == "PENDING":
            with suppress(subprocess.CalledProcessError):  # it has started since
                command(slurm, "scontrol", "update", f"JobId={job}", "StartTime=now")
        return state() == "RUNNING"

    def wait_for_start() -> None:
        wait(lambda: state() == "PENDING", "the job is queued again")
        time.sleep(3)  # slurmd refuses a job that starts within the second in which its earlier start was revoked
        wait(on_its_way, "the job starts again")

    def said(text: str) -> Callable[[], bool]:
        return lambda: output.exists() and text in read(output)

    job = submit(slurm, output, {"CONFIG": config, "RUN": run}, "train.sbatch")
    wait(lambda: rows() > 20, "the first rows of the log")
    command(slurm, "scancel", "--signal=USR1", job)
    wait(said("left on notice"), "the job leaves on SIGUSR1")
    before = rows()
    wait_for_start()
    wait(lambda: rows() > before + 20, "the job goes on after it queued itself again")
    command(slurm, "scontrol", "requeue", job)
    wait(lambda: read(output).count("left on notice") == 2, "the job leaves when it is pre-empted")
    wait_for_start()
    wait(lambda: (run / f"checkpoint_{STEPS:08d}.pt").exists(), "the last checkpoint")
    whole = tmp_path / "whole"
    mpirun = shutil.which("mpirun.openmpi") or "mpirun"
    allowed = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    line = [mpirun, "--oversubscribe", "-n", "2", sys.executable, "-m", "ddpatch", "train", str(config), "--run", str(whole)]
    subprocess.run(line, check=True, env=allowed, timeout=300, capture_output=True)
    states = [torch.load(folder / f"checkpoint_{STEPS:08d}.pt", weights_only=True) for folder in (whole, run)]
    for key in ("model", "ema"):
        assert all(torch.equal(states[0][key][name], tensor) for name, tensor in states[1][key].items())


def test_samples_are_drawn_and_compared_with_data(slurm: dict[str, str], config: Path, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "out"
    line = ["-m", "ddpatch", "train", str(config), "--run", str(run), "--set", "train.steps=1"]
    subprocess.run([sys.executable, *line], check=True, timeout=120, capture_output=True)
    job = submit(slurm, output, {"RUN": run, "COUNT": 2, "REFERENCE": tmp_path / "data.h5"}, "sample.sbatch")
    finish(slurm, job, output)
    with h5py.File(run / f"samples-{job}.h5") as file:
        assert file["fields"].shape == (2, 2, 16, 24)
        assert file["fields"].attrs["ranks"] == 2
    assert (run / f"report-{job}" / "report.html").exists()


def test_scaling_is_measured_from_one_rank_to_two(slurm: dict[str, str], tmp_path: Path) -> None:
    output, results = tmp_path / "out", tmp_path / "results"
    options = ["--points=8", "--patch=4", "--channels=8", "--steps=1", "--rounds=1", f"--folder={tmp_path}"]
    job = submit(slurm, output, {"RANKS": "1 2", "OUTPUT": results}, "scaling.sbatch", *options)
    finish(slurm, job, output)
    (table,) = results.glob("scaling_strong_*.csv")
    rows = list(csv.DictReader(table.open()))
    assert [(row["verb"], row["ranks"], row["threads"]) for row in rows] == [
        (verb, ranks, "1") for ranks in ("1", "2") for verb in ("train", "sample")
    ]
    assert table.with_suffix(".md").exists() and table.with_suffix(".png").exists()
