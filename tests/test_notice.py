"""Notice to leave, given to real jobs: by a signal to one rank, by a time limit, by the end of a batch job."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from problems import small_config, write_fields

from ddpatch.errors import UserError
from ddpatch.notice import MARGIN_SECONDS, Notice, parse_duration

LIMIT = 60.0
MPIEXEC = next((p for p in (Path(sys.executable).with_name("mpiexec"), shutil.which("mpiexec")) if p and Path(p).exists()), None)


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    """A training on 2 ranks that would take hours."""
    config = folder / "config.yaml"
    config.write_text(small_config(write_fields(folder / "data.h5"), train={"steps": 10**6}).as_yaml())
    command = [str(MPIEXEC), "-n", "2", sys.executable, "-m", "ddpatch", "train", str(config), "--run", str(folder / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, env=environment)


def ranks_of(job: subprocess.Popen[str], folder: Path) -> list[int]:
    """Process numbers of the ranks: those with the run's folder among their arguments, but for the launcher's own."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if arguments[0] == sys.executable.encode() and str(folder / "run").encode() in arguments:
            found.append(int(path.parent.name))
    return sorted(set(found) - {job.pid})


def wait_for_rows(job: subprocess.Popen[str], log: Path, rows: int) -> None:
    deadline = time.monotonic() + LIMIT
    while not (log.exists() and log.read_text().count("\n") >= rows):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(MPIEXEC is None, reason="no mpiexec beside python or on PATH")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_leads_to_a_checkpoint_and_code_75(tmp_path: Path, number: signal.Signals) -> None:
    job = start(tmp_path)
    try:
        wait_for_rows(job, tmp_path / "run" / "log.jsonl", 3)
        os.kill(ranks_of(job, tmp_path)[-1], number)
        text = job.communicate(timeout=LIMIT)[1]
    finally:
        job.kill()
    assert job.returncode == 75
    assert "ddpatch: left on notice after step" in text and "Traceback" not in text
    assert len(list((tmp_path / "run").glob("checkpoint_*.pt"))) == 1


@pytest.mark.skipif(MPIEXEC is None, reason="no mpiexec beside python or on PATH")
def test_a_time_limit_ends_a_step_with_code_75(tmp_path: Path) -> None:
    job = start(tmp_path, "--time-limit", "0")
    try:
        text = job.communicate(timeout=LIMIT)[1]
    finally:
        job.kill()
    assert job.returncode == 75 and "left on notice after step 1, with a checkpoint" in text


def test_the_end_of_a_batch_job_is_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not Notice().given()
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time() + MARGIN_SECONDS + 30)))
    assert not Notice().given()
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time() + MARGIN_SECONDS - 1)))
    assert Notice().given()


def test_signals_are_as_before_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Notice() as notice:
        os.kill(os.getpid(), signal.SIGTERM)
        assert notice.given()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("text", "seconds"), [("90", 5400.0), ("2:30", 150.0), ("01:00:05", 3605.0), ("0", 0.0)])
def test_durations_are_those_of_batch_systems(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "1h", "-5", "1:2:3:4", "1:75"])
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--time-limit"):
        parse_duration(text)
