"""Which tests run under mpiexec, the fixtures they share, and one verdict of all ranks for every multi-rank test.

``pytest tests`` runs the unmarked tests; ``mpiexec -n N python -m pytest --with-mpi tests`` runs those marked ``mpi``. An
assertion that fails on one rank only would leave the others waiting, or would be lost because only rank 0 prints; so all ranks
agree on the outcome of every phase of a test before they go on.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import pytest

if TYPE_CHECKING:
    from ddpatch.parallel.comm import Communicator

MOST_RANKS = 4
LIMIT_SECONDS = float(os.environ.get("DDPATCH_VERDICT_SECONDS", "60"))
NOTHING_SKIPPED = os.environ.get("DDPATCH_CI") == "1"  # set on the leg with the most ranks


@pytest.fixture
def comm() -> Iterator[Communicator]:
    """A communicator of all ranks, with its counters at zero."""
    from ddpatch.parallel.comm import Communicator

    communicator = Communicator()
    yield communicator
    communicator.free()


@pytest.fixture
def shared_path(comm: Communicator) -> Iterator[Path]:
    """An empty directory that all ranks see, made and removed by rank 0. On several nodes TMPDIR must be a shared directory."""
    path = comm.on_root(lambda: Path(tempfile.mkdtemp(prefix="ddpatch-")))
    yield path
    comm.barrier()
    comm.on_root(lambda: shutil.rmtree(path, ignore_errors=True))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder ``../shared/data`` beside the checkout; the test is skipped where there is none."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no folder ../shared/data beside the checkout")
    return path


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Start MPI, under ``--with-mpi`` only, and let rank 0 alone print the report."""
    limit = float(config.getini("faulthandler_timeout"))
    if limit > 0:
        config.pluginmanager.register(Overdue(0.75 * limit), "overdue")
    if not _with_mpi(config):
        return
    verdict = Verdict(LIMIT_SECONDS, config.pluginmanager.getplugin("capturemanager"))
    config.pluginmanager.register(verdict, "verdict")
    if verdict.rank > 0:
        config.pluginmanager.unregister(name="terminalreporter")
        silent = Path(os.devnull).open("w")  # noqa: SIM115 (open until the process ends)
        config.pluginmanager.register(pytest.TerminalReporter(config, silent), "terminalreporter")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the marked tests under ``--with-mpi`` and the unmarked ones otherwise; refuse marks that would silently do nothing."""
    for item in items:
        for mark in item.iter_markers("mpi"):
            _check(item.nodeid, mark)
    marked = _with_mpi(config)
    left_out = [item for item in items if (item.get_closest_marker("mpi") is not None) != marked]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


class Verdict:
    """A pytest plugin: what all ranks agree on after each phase of a test, on a communicator of its own.

    Arguments:
        limit: Seconds that a failing rank waits for the others before it prints its failure and aborts the job. A rank that has
            not failed waits until ``faulthandler_timeout`` ends the run.
        capture: What captures output. It is told not to, for the captured words of a rank that aborts the job would be lost.
    """

    def __init__(self, limit: float, capture: Any) -> None:
        from ddpatch.parallel.comm import Communicator

        communicator = Communicator()
        self.rank, self.size = communicator.rank, communicator.size
        self._comm = communicator.raw
        self._limit = limit
        self._capture = capture
        self._broken: list[str] = []

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_call(self) -> Generator[None, Any, Any]:
        """Let the output of a test through while it runs."""
        self._capture.suspend_global_capture()
        try:
            return (yield)
        finally:
            self._capture.resume_global_capture()

    pytest_runtest_setup = pytest_runtest_teardown = pytest_runtest_call

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Let a phase of a test fail on all ranks if it failed on one. Collective."""
        report = yield
        outcome = self.agree(report.longreprtext or "no text" if report.failed else "")
        if outcome:
            report.outcome, report.longrepr = "failed", outcome
        elif len(set(skipped := self._comm.allgather(report.skipped))) > 1:
            report.outcome, report.longrepr = "failed", f"skipped on ranks {np.flatnonzero(skipped).tolist()} only"
        return report

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Remember a test file that this rank cannot import."""
        if report.failed:
            self._broken.append(report.longreprtext)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Stop unless all ranks collected the same tests and, on the leg with the most ranks, are enough for each. Collective."""
        outcome = self.agree("\n".join(self._broken))
        names = [item.nodeid for item in items]
        outcome = outcome or self.agree("" if names == self._comm.bcast(names) else f"collected other tests than rank 0: {names}")
        starved = [item.nodeid for item in items if _min_size(item) > self.size]
        if NOTHING_SKIPPED and starved:
            outcome = outcome or f"DDPATCH_CI=1, and {self.size} ranks are too few for {', '.join(starved)}"
        if outcome:
            pytest.exit(outcome, returncode=pytest.ExitCode.USAGE_ERROR)

    def pytest_internalerror(self, excrepr: object) -> None:
        """End the job, for the other ranks may be waiting for this one."""
        if self.size > 1:
            self.abort(str(excrepr))

    def agree(self, failure: str) -> str:
        """What the first failing rank says, or the empty string if no rank failed. Collective.

        Arguments:
            failure: This rank's failure; empty where there was none.
        """
        failed = np.zeros(self.size, np.uint8)
        request = self._comm.Iallgather(np.array([bool(failure)], np.uint8), failed)
        deadline = time.monotonic() + self._limit
        while not request.Test():
            if failure and time.monotonic() > deadline:
                self.abort(f"{failure}\nThe other ranks never arrived within {self._limit:g} s.")
            time.sleep(0.001)
        ranks = np.flatnonzero(failed).tolist()
        if not ranks:
            return ""
        return f"failed on ranks {ranks}; rank {ranks[0]} says:\n{self._comm.bcast(failure, root=ranks[0])}"

    def abort(self, text: str) -> NoReturn:
        """Print this rank's failure and end the job on all ranks."""
        os.write(2, f"\nrank {self.rank} of {self.size} failed:\n{text}\n".encode())
        self._comm.Abort(1)
        raise AssertionError("MPI_Abort returned")


class Overdue:
    """A pytest plugin that says, shortly before a test's time is up, what the threads of this process do: stacks of Python do not
    tell whether native code waits, turns in circles, or is given no processor.

    Arguments:
        seconds: After which a test is overdue.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Watch one test."""
        timer = threading.Timer(self._seconds, self._describe, [item.nodeid])
        timer.daemon = True
        timer.start()
        try:
            return (yield)
        finally:
            timer.cancel()

    def _describe(self, name: str) -> None:
        before = _threads()
        time.sleep(1)
        lines = [
            f"process {os.getpid()}: {name} still runs after {self._seconds:g} s; state, ticks in a second, processor, wait:"
        ]
        for thread, (words, ticks) in _threads().items():
            lines.append(f"    {thread}: {words.format(ticks - before.get(thread, ('', 0))[1])}")
        os.write(2, "\n".join(["", *lines, ""]).encode())


def _threads() -> dict[str, tuple[str, int]]:
    """What Linux says of the threads of this process, and the ticks of processor time that they have had."""
    found = {}
    for task in sorted(Path("/proc/self/task").glob("*")):
        with contextlib.suppress(OSError):  # the thread is gone
            called, _, rest = (task / "stat").read_text().partition(" (")[2].rpartition(") ")
            fields, waits = rest.split(), (task / "wchan").read_text()
            found[f"{task.name} {called}"] = f"{fields[0]}, {{}}, {fields[36]}, {waits}", int(fields[11]) + int(fields[12])
    return found


def _with_mpi(config: pytest.Config) -> bool:
    return bool(config.getoption("--with-mpi") or config.getoption("--only-mpi"))


def _min_size(item: pytest.Item) -> int:
    return max((mark.kwargs.get("min_size", 1) for mark in item.iter_markers("mpi")), default=1)


def _check(name: str, mark: pytest.Mark) -> None:
    if mark.args or set(mark.kwargs) - {"min_size"}:
        raise pytest.UsageError(f"{name}: mpi() reads min_size only, got {[*mark.args, *mark.kwargs]}")
    if not 1 <= mark.kwargs.get("min_size", 1) <= MOST_RANKS:
        raise pytest.UsageError(f"{name}: min_size={mark.kwargs['min_size']}, but the suite runs on 1 to {MOST_RANKS} ranks")
