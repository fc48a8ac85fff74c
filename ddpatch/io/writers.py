"""The choice between the three ways of writing samples."""

from __future__ import annotations

from pathlib import Path

import h5py

from ddpatch.decomposition import Decomposition
from ddpatch.errors import UserError, nearest
from ddpatch.io.gather import GatherWriter
from ddpatch.io.mpio import MpioWriter
from ddpatch.io.virtual import VirtualWriter
from ddpatch.io.volume import VolumeHeader
from ddpatch.io.writer import VolumeWriter
from ddpatch.parallel.comm import Communicator

WRITERS: dict[str, type[VolumeWriter]] = {"gather": GatherWriter, "virtual": VirtualWriter, "mpio": MpioWriter}


def open_writer(
    path: str | Path,
    header: VolumeHeader,
    decomposition: Decomposition,
    comm: Communicator,
    mode: str = "auto",
    overwrite: bool = False,
) -> VolumeWriter:
    """Open the writer of a mode; ``auto`` is gather on one rank, on several mpio where h5py has it, else virtual. Collective.

    Raises:
        UserError: if the file exists and may not be replaced, or the mode is not known or not available.
    """
    if mode == "auto":
        parallel = "mpio" if h5py.get_config().mpi else "virtual"
        mode = "gather" if comm.size == 1 else parallel
    if mode not in WRITERS:
        raise UserError(f"output.mode: expected auto, {', '.join(WRITERS)}, got '{mode}'{nearest(mode, WRITERS)}")
    return WRITERS[mode](path, header, decomposition, comm, overwrite)
