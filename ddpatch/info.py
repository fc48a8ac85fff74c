"""What this installation consists of: the first thing to ask for in a report of a problem."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import h5py
import torch

from ddpatch import __version__
from ddpatch.execution import computes_bfloat16
from ddpatch.parallel.comm import Communicator, mpi_library

PACKAGES = ("torch", "mpi4py", "numpy", "h5py", "einops", "pyyaml", "matplotlib", "tensorboard")


def describe(comm: Communicator) -> str:
    """Versions, MPI library, parallel HDF5, devices and ranks, a line each. Collective."""
    device = comm.place("auto")
    places = comm.gather((platform.node(), str(device), torch.get_num_threads()))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines = {
        "ddpatch": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "MPI library": mpi_library(),
        "HDF5": h5py.version.hdf5_version,
        "parallel HDF5": "yes" if h5py.get_config().mpi else "no (samples of several ranks become a virtual data set)",
        "cores": str(len(os.sched_getaffinity(0))),
        "GPUs": ", ".join(gpus) or "none",
        "bfloat16": "yes" if computes_bfloat16(device) else "no (execution.precision has to be full)",
        "ranks": str(comm.size),
        **{f"rank {rank}": f"{node}, {device}, {threads} threads" for rank, (node, device, threads) in enumerate(places)},
    }
    return "\n".join(f"{key:<14} {value}" for key, value in lines.items())


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
