"""Real jobs under mpiexec, for tests of how they end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

LIMIT = 90.0  # tests run two at a time, and each starts a few ranks
MPIEXEC = next((p for p in (Path(sys.executable).with_name("mpiexec"), shutil.which("mpiexec")) if p and Path(p).exists()), None)

NEEDS_MPIEXEC = pytest.mark.skipif(MPIEXEC is None, reason="no mpiexec beside python or on PATH")

PREAMBLE = """
import sys, time
from ddpatch.errors import UserError
from ddpatch.parallel.comm import Communicator, guard

def verb(comm):
"""


def launch(ranks: int, *argv: object) -> tuple[subprocess.CompletedProcess[str], float]:
    start = time.monotonic()
    done = subprocess.run(
        [str(MPIEXEC), "-n", str(ranks), sys.executable, *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return done, time.monotonic() - start


def script(folder: Path, body: str) -> Path:
    path = folder / "job.py"
    path.write_text(PREAMBLE + "".join(f"    {line}\n" for line in body.splitlines()) + "\nsys.exit(guard(verb))\n")
    return path
