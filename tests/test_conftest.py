"""The verdict of all ranks, tried out on small suites that fail in the ways that hang or hide otherwise."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")
HEADER = "import pytest\n\n@pytest.mark.mpi(min_size=2)\n"
LAUNCHED = ("PMI", "MPI", "OMPI", "PMIX", "PRTE", "HYDRA", "SLURM", "PYTEST", "DDPATCH")


def mpiexec() -> str:
    """The mpiexec of the MPI library that this Python uses."""
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if found is None:
        pytest.skip("no mpiexec beside python or on PATH")
    return found


def run_suite(folder: Path, body: str, ranks: int = 2, options: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a suite of one marked test, with this conftest, on several ranks; without mpiexec for ``ranks=0``."""
    shutil.copy(CONFTEST, folder)
    (folder / "test_suite.py").write_text(HEADER + body)
    (folder / "pytest.ini").write_text(f"[pytest]\nmarkers = mpi(min_size)\n{options}")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHED)}
    paths = [str(CONFTEST.parents[1]), environment.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1", **variables}
    launcher = [mpiexec(), "-n", str(ranks)] if ranks else []
    command = [*launcher, sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *(["--with-mpi"] if ranks else []), "."]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)


def test_failure_of_rank_1_is_reported_by_rank_0(tmp_path: Path) -> None:
    body = 'def test_one(comm):\n    assert comm.rank == 0, "the words of rank 1"\n'
    after = "\n@pytest.mark.mpi\ndef test_two(comm, shared_path):\n    comm.barrier()\n"
    run = run_suite(tmp_path, body + after)
    assert run.returncode != 0
    assert "failed on ranks [1]; rank 1 says:" in run.stdout
    assert "AssertionError: the words of rank 1" in run.stdout
    assert "1 failed, 1 passed" in run.stdout
    assert run.stdout.count("test session starts") == 1


def test_failure_in_a_fixture_of_rank_1_is_reported_by_rank_0(tmp_path: Path) -> None:
    body = "def test_one(broken):\n    broken.barrier()\n"
    fixture = '\n@pytest.fixture\ndef broken(comm):\n    assert comm.rank == 0, "the words of rank 1"\n    return comm\n'
    run = run_suite(tmp_path, body + fixture)
    assert run.returncode != 0
    assert "AssertionError: the words of rank 1" in run.stdout
    assert "1 error" in run.stdout


def test_failure_before_a_collective_ends_the_run_with_its_text(tmp_path: Path) -> None:
    body = 'def test_one(comm):\n    assert comm.rank == 0, "the words of rank 1"\n    comm.barrier()\n'
    run = run_suite(tmp_path, body, DDPATCH_VERDICT_SECONDS="2")
    assert run.returncode != 0
    assert "AssertionError: the words of rank 1" in run.stderr
    assert "The other ranks never arrived within 2 s." in run.stderr


def test_file_that_one_rank_cannot_import_ends_the_run_with_its_text(tmp_path: Path) -> None:
    body = "def test_one(comm):\n    comm.barrier()\n"
    broken = '\nfrom ddpatch.parallel.comm import Communicator\nassert Communicator().rank == 0, "the words of rank 1"\n'
    run = run_suite(tmp_path, body + broken)
    assert run.returncode != 0
    assert "AssertionError: the words of rank 1" in run.stdout


@pytest.mark.parametrize(("mark", "words"), [("minsize=2", "min_size only"), ("min_size=5", "1 to 4 ranks"), ("2", "only")])
def test_mark_that_would_do_nothing_is_refused(tmp_path: Path, mark: str, words: str) -> None:
    run = run_suite(tmp_path, f"def test_one():\n    pass\n\n@pytest.mark.mpi({mark})\ndef test_two():\n    pass\n", ranks=0)
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert "test_suite.py::test_two" in run.stderr
    assert words in run.stderr


def test_too_few_ranks_fail_on_the_last_leg(tmp_path: Path) -> None:
    run = run_suite(tmp_path, "def test_one():\n    pass\n", ranks=1, DDPATCH_CI="1")
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert "1 ranks are too few for test_suite.py::test_one" in run.stdout


def test_an_overdue_test_says_what_its_threads_do(tmp_path: Path) -> None:
    """One rank turns in circles, the other one waits for it."""
    body = "def test_one(comm):\n    while comm.rank == 0:\n        pass\n    comm.barrier()\n"
    limit = "faulthandler_timeout = 5\nfaulthandler_exit_on_timeout = true\n"
    run = run_suite(tmp_path, body, options=limit)
    assert run.returncode != 0
    assert run.stderr.count("test_suite.py::test_one still runs after 3.75 s") == 2
    assert re.search(r"\d+ python\S*: [RS], \d+, \d+, ", run.stderr)
