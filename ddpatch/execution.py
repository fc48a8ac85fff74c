"""How a configuration is executed: whether it can be with these patches on this device, compiled code, and freed memory."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch

from ddpatch.config import Config, ExecutionConfig
from ddpatch.decomposition import Decomposition
from ddpatch.errors import UserError
from ddpatch.model.two_level import TwoLevelModel

MMAP_MAX, TRIM_THRESHOLD = -4, -1  # of glibc's mallopt
CODE_FOLDER = "TORCHINDUCTOR_CACHE_DIR"
BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # as x86 and ARM processors name it


def fit_groups(config: Config, decomposition: Decomposition) -> Config:
    """The configuration with no more patches at once than a rank has."""
    at_once = config.execution.patches_at_once
    return with_groups(config, at_once and min(at_once, max(decomposition.counts)))


def with_groups(config: Config, at_once: int | None) -> Config:
    """The configuration with as many patches at once, all for ``None``: chosen, so that no tuning is left to do."""
    return dataclasses.replace(config, execution=dataclasses.replace(config.execution, patches_at_once=at_once, tune=False))


def check_groups(config: Config, decomposition: Decomposition) -> None:
    """Raise a UserError, on all ranks alike, if ``execution.patches_at_once`` is more than any rank has."""
    at_once, most = config.execution.patches_at_once, max(decomposition.counts)
    if at_once is not None and at_once > most:
        raise UserError(
            f"execution.patches_at_once: expected at most {most}, got {at_once}: "
            f"{decomposition.num_patches} patches over {decomposition.size} ranks are at most {most} on a rank"
        )


def check_precision(config: Config, device: torch.device) -> None:
    """Raise a UserError if this rank's device does not compute in the type that the features are to have."""
    if config.execution.precision == "bfloat16" and not computes_bfloat16(device):
        raise UserError(
            f"execution.precision: expected full, got bfloat16: that needs a GPU with it or a processor with avx512_bf16 or "
            f"amx_bf16, and {device} on {os.uname().nodename} is none"
        )


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies numbers of that type, rather than converts them first."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    described = Path("/proc/cpuinfo")
    return described.exists() and not BFLOAT16.isdisjoint(described.read_text().split())


def check_compiler(config: Config, device: torch.device) -> None:
    """Raise a UserError if code is to be compiled, and this rank's machine lacks what that takes."""
    if not config.execution.compile:
        return
    compiler = os.environ.get("CXX", "g++")
    found = {f"the C++ compiler {compiler} (CXX names another)": shutil.which(compiler) is not None}
    found["the headers of Python"] = Path(sysconfig.get_path("include"), "Python.h").exists()
    if device.type == "cuda":
        found["the package triton"] = importlib.util.find_spec("triton") is not None
    for what, there in found.items():
        if not there:
            raise UserError(f"execution.compile: expected false, got true: {os.uname().nodename} lacks {what}")


def compile_fine_level(model: TwoLevelModel, execution: ExecutionConfig) -> None:
    """Let torch compile encoder and decoder when they first run: pointwise operations are fused, which saves passes over memory.

    What is compiled is kept in ``ddpatch/compiled`` of the user's cache folder, where :data:`CODE_FOLDER` names no other.
    Graphs are made anew in every process: torch would keep them as pickles.
    """
    if not execution.compile or next(model.parameters()).device.type == "meta":
        return
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get(CODE_FOLDER) in (None, default_cache_dir()):  # in /tmp, which is no place for code to be loaded from
        os.environ[CODE_FOLDER] = str(cache_folder() / "compiled")
    functorch.enable_autograd_cache = inductor.fx_graph_cache = False
    inductor.compile_threads = 1  # no pool of processes beside MPI
    for part in (model.encoder, model.decoder):
        part.compile(dynamic=False)


def cache_folder() -> Path:
    """``ddpatch`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpatch"


def keep_freed_memory(device: torch.device, at_once: int | None = None) -> None:
    """Let the C library keep what is freed, since the next step needs it again: else every large array is mapped and zeroed
    anew, a sixth of a step at 64³ on a processor (docs/decisions/0015).

    Arguments:
        device: This rank's.
        at_once: Patches of a group. With groups memory is what matters: what is large then is whole fields, which go back.

    Nothing happens where the environment says what the library is to do (``MALLOC_*``, ``GLIBC_TUNABLES``), with another library,
    and on GPUs, whose memory torch keeps anyway.
    """
    if device.type == "cpu" and at_once is None and keeps_freed_memory():
        ctypes.CDLL(None).mallopt(MMAP_MAX, 0)
        ctypes.CDLL(None).mallopt(TRIM_THRESHOLD, -1)


def keeps_freed_memory() -> bool:
    """Whether :func:`keep_freed_memory` does anything on processors."""
    told = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    return hasattr(ctypes.CDLL(None), "mallopt") and not told
