"""What the launcher says about the ranks of a node, and what they make of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ddpatch.errors import UserError
from ddpatch.parallel import launcher
from jobs import NEEDS_MPIEXEC, launch


@pytest.mark.parametrize(("ranks", "sleep"), [("1", None), ("4", None), ("5", "1"), ("", None)])
def test_ranks_sleep_only_where_cores_are_fewer(monkeypatch: pytest.MonkeyPatch, ranks: str, sleep: str | None) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setenv(launcher.LOCAL_SIZE, ranks)
    monkeypatch.delenv(launcher.SLEEPS, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    launcher.sleep_if_crowded()
    assert os.environ.get(launcher.SLEEPS) == sleep


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launcher.LOCAL_SIZE, str(1 + (os.cpu_count() or 1)))
    monkeypatch.setenv(launcher.SLEEPS, "0")
    launcher.sleep_if_crowded()
    assert os.environ[launcher.SLEEPS] == "0"


@NEEDS_MPIEXEC
def test_a_rank_that_waits_in_a_crowd_leaves_its_core_to_others(tmp_path: Path) -> None:
    """Of two seconds in a barrier it uses a fraction; by itself the library would use all of them."""
    job = tmp_path / "job.py"
    job.write_text(
        "import os, sys, time\n"
        "os.cpu_count = lambda: 1\n"
        "from ddpatch.parallel.comm import Communicator, mpi_library\n"
        "comm, start = Communicator(), time.process_time()\n"
        "if comm.rank == 0:\n    time.sleep(2)\n"
        "comm.barrier()\n"
        "used = comm.gather(time.process_time() - start)\n"
        "if comm.rank == 0:\n    print(mpi_library().split()[0], used[1])\n"
    )
    done, _ = launch(2, job)
    assert done.returncode == 0, done.stderr
    library, used = done.stdout.split()
    if library != "MPICH":
        pytest.skip(f"{library} has no such setting")
    assert float(used) < 1


def test_a_library_of_another_launcher_is_refused_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    launcher.check_library("Open MPI v5.0.0")
    with pytest.raises(UserError, match=r"Open MPI's mpirun started 3 processes, but mpi4py uses MPICH 5\.0"):
        launcher.check_library("MPICH 5.0")


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_SIZE", "2")
    launcher.check_size(2, "MPICH 5.0")
    with pytest.raises(UserError, match=r"mpiexec of MPICH started 2 processes"):
        launcher.check_size(1, "MPICH 5.0")
