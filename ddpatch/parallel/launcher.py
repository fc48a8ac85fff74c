"""What the launcher of this process says in its environment: whose MPI it belongs to, how many ranks it started, and where."""

from __future__ import annotations

import os

from ddpatch.errors import UserError

LAUNCHERS = {  # size variable: (launcher, what the MPI library calls itself; None: whichever is built against it)
    "OMPI_COMM_WORLD_SIZE": ("Open MPI's mpirun", "Open MPI"),
    "PMI_SIZE": ("mpiexec of MPICH", None),
    "SLURM_STEP_NUM_TASKS": ("srun", None),
}
RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
LOCAL_SIZE = "MPI_LOCALNRANKS"  # of MPICH's mpiexec
SLEEPS = "MPIR_CVAR_ENABLE_HEAVY_YIELD"


def check_library(library: str) -> None:
    """Before MPI starts, which would otherwise end the process with its own words: does it belong to the launcher?

    Arguments:
        library: Name of the MPI library.

    Raises:
        UserError: if the launcher of another library started several processes.
    """
    for variable, (launcher, family) in LAUNCHERS.items():
        if family and _asked(variable) > 1 and family not in library:
            raise UserError(_foreign(launcher, _asked(variable), library))


def check_size(size: int, library: str) -> None:
    """After MPI has started: do the processes see each other?

    Arguments:
        size: Number of ranks that this one sees.
        library: Name of the MPI library.

    Raises:
        UserError: if the launcher started several processes, and this one sees none of the others.
    """
    for variable, (launcher, _) in LAUNCHERS.items():
        if _asked(variable) > 1 and size == 1:
            raise UserError(_foreign(launcher, _asked(variable), library))


def sleep_if_crowded() -> None:
    """Before MPI starts: let ranks of MPICH sleep while they wait, if this node has fewer cores than ranks.

    They would turn in a circle of ``sched_yield`` otherwise, which a scheduler may take for work and prefer to that of the ranks
    they wait for, by minutes (decision 24). What the user has set stays.
    """
    if _asked(LOCAL_SIZE) > (os.cpu_count() or 1):
        os.environ.setdefault(SLEEPS, "1")


def is_first() -> bool:
    """Whether no launcher says that this is another rank than the first."""
    return all(os.environ.get(variable, "0") == "0" for variable in RANKS)


def _asked(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdigit() else 1


def _foreign(launcher: str, asked: int, library: str) -> str:
    return (
        f"{launcher} started {asked} processes, but mpi4py uses {library} and each would run alone; "
        "use the mpiexec or srun that belongs to it"
    )
