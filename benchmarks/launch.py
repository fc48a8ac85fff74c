"""How benchmarks start ranks: under mpiexec, or under srun inside a SLURM job."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path


def launch(ranks: int, *command: str, threads: int = 1, log: Path | None = None) -> str:
    """Run a command of this interpreter on some ranks; returns what it prints. ``log``: a file for its progress."""
    line = [*_starter(ranks, threads), sys.executable, *command]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with log.open("w") if log else nullcontext() as errors:
        done = subprocess.run(line, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    if done.returncode:
        sys.exit(f"exit code {done.returncode} of {shlex.join(line)}")
    return done.stdout


def _starter(ranks: int, threads: int) -> list[str]:
    if "SLURM_JOB_ID" not in os.environ:
        return [str(shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")), "-n", str(ranks)]
    per_node = min(ranks, -(-int(os.environ.get("SLURM_NTASKS", ranks)) // int(os.environ["SLURM_JOB_NUM_NODES"])))
    shape = {"nodes": -(-ranks // per_node), "ntasks": ranks, "ntasks-per-node": per_node, "cpus-per-task": threads}
    mpi = os.environ.get("MPI", "pmix")  # what srun --mpi=list offers
    return ["srun", f"--mpi={mpi}", "--cpu-bind=cores", *(f"--{key}={value}" for key, value in shape.items())]
