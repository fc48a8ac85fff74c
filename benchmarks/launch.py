"""A command under mpiexec."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path


def launch(ranks: int, *command: str, threads: int = 1, log: Path | None = None) -> str:
    """Run a command of this interpreter under mpiexec; returns what it prints. ``log``: a file for its progress."""
    mpiexec = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    line = [str(mpiexec), "-n", str(ranks), sys.executable, *command]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with log.open("w") if log else nullcontext() as errors:
        return subprocess.run(line, check=True, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment).stdout
