"""How many patches go through the fine level together: all if they fit into memory, else as many as are fastest.

Groups compute twice what all patches together do (:mod:`ddpatch.model.groups`), so that they are for memory only; how large they
are best depends on caches and libraries, and is measured once per machine.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ddpatch.config import Config
from ddpatch.decomposition import Decomposition
from ddpatch.errors import UserError
from ddpatch.execution import cache_folder, with_groups
from ddpatch.io.volume import VolumeHeader, replace_when_complete
from ddpatch.machine import free_memory, spare_share
from ddpatch.parallel.collectives import Exchange
from ddpatch.parallel.comm import Communicator
from ddpatch.rehearsal import rehearse
from ddpatch.run import Field, decompose, dtype, make_denoiser, make_model, replicas

SAFE = 0.9  # of the free memory
GROUPS = 2  # that a measured step has


def choose_groups(config: Config, header: VolumeHeader, field: Field, comm: Communicator, device: torch.device) -> Config:
    """The configuration with ``execution.patches_at_once`` chosen, where ``execution.tune`` asks for it. Collective.

    All ranks choose the same: what fits on every rank, and is fastest on the slowest. Times are kept in :func:`cache_path` of the
    machine of rank 0.

    Arguments:
        config: Resolved configuration.
        header, field: Of the data.
        comm: All ranks.
        device: This rank's.

    Raises:
        UserError: on all ranks, if not even one patch at a time fits.
    """
    if not config.execution.tune:
        return config
    most = max(decompose(config, comm.size // replicas(config, comm.size)).counts)
    sizes = [2**n for n in range(most.bit_length()) if 2**n < most]
    limit = min(comm.gather(SAFE * free_memory(device, comm)))
    if needed(config, most, header, comm, device) <= limit:
        return with_groups(config, None)
    fitting = [n for n in sizes if needed(config, n, header, comm, device) <= limit]
    if not fitting:
        raise UserError(
            f"memory: a rank has {limit / 2**30:.3f} GiB free for a training step, too little for one patch at a time; "
            "ddpatch plan says what to change"
        )
    seconds = known_seconds(config, fitting, field, comm, device)
    return with_groups(config, min(fitting, key=lambda n: seconds[n]))


def needed(config: Config, at_once: int, header: VolumeHeader, comm: Communicator, device: torch.device) -> float:
    """Bytes of a training step on the rank that needs most, beside what it holds by now. Collective."""
    step = rehearse(with_groups(config, at_once), header, comm.size).step.memory
    return step.total() * (1 + spare_share(device))


def known_seconds(
    config: Config, sizes: Sequence[int], field: Field, comm: Communicator, device: torch.device
) -> dict[int, float]:
    """Seconds of a training step per patch, by the patches of a group: from the cache, or measured now. Collective."""
    path = cache_path()
    cache: dict[str, float] = comm.on_root(lambda: read_cache(path))
    keys = comm.broadcast({n: key_of(config, n, device) for n in sizes})
    missing = [n for n in sizes if keys[n] not in cache]
    if missing:
        alone, share = comm.split(comm.rank), -(-config.train.batch // replicas(config, comm.size))
        found = [max(comm.gather(measure(config, n, share, field, alone, device))) for n in missing]
        alone.free()
        cache |= {keys[n]: seconds for n, seconds in zip(missing, found, strict=True)}
        comm.on_root(lambda: write_cache(path, cache))
    return {n: cache[keys[n]] for n in sizes}


def measure(config: Config, at_once: int, share: int, field: Field, alone: Communicator, device: torch.device) -> float:
    """Seconds per patch of the second of two training steps, on a row of as many patches as are two groups.

    Arguments:
        config: Resolved configuration.
        at_once: Patches of a group.
        share: Samples of a rank.
        field: Of the data.
        alone: This rank only.
        device: This rank's.
    """
    patch, number = config.domain.patch, GROUPS * at_once
    grid = Decomposition((patch[0] * number, *patch[1:]), patch, 1, config.domain.periodic or ())
    exchange, model = Exchange(grid, alone, config.model.reach), make_model(config, field).to(device)
    denoiser = make_denoiser(with_groups(config, at_once), field, model, exchange)
    clean = torch.randn(share, number, len(field.channels), *patch, dtype=dtype(config), device=device)
    sigma, seconds = torch.ones(share, dtype=torch.float64, device=device), 0.0
    for _ in range(2):
        start = time.perf_counter()
        denoiser.loss(clean, torch.randn_like(clean), sigma).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    return seconds / number


def key_of(config: Config, at_once: int, device: torch.device) -> str:
    """What a time depends on, as a short name."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    facts = (
        name,
        torch.get_num_threads(),
        torch.__version__,
        config.domain.patch,
        config.model,
        with_groups(config, at_once).execution,
    )
    return hashlib.sha256(repr((*facts, config.train.batch, config.train.dtype)).encode()).hexdigest()[:16]


def processor() -> str:
    """Name of this machine's processor."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def cache_path() -> Path:
    """``ddpatch/groups.json`` in the user's cache folder."""
    return cache_folder() / "groups.json"


def read_cache(path: Path) -> dict[str, float]:
    """Times by key; nothing where there is no readable file."""
    try:
        return {str(key): float(value) for key, value in json.loads(path.read_text()).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def write_cache(path: Path, cache: dict[str, float]) -> None:
    """Keep times, if the folder can be written."""
    try:
        with replace_when_complete(path, overwrite=True) as temporary:
            temporary.write_text(json.dumps(cache, indent=1) + "\n")
    except (OSError, UserError):
        pass
