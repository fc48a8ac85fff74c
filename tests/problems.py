"""Small problems that several tests share."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpatch.config import Config, build
from ddpatch.data.normalisation import Normalisation
from ddpatch.io.volume import VolumeHeader, write_volume
from ddpatch.parallel.comm import Communicator
from ddpatch.parallel.transport import CudaAwareTransport
from ddpatch.run import Field
from ddpatch.statistics.covariance import Moments

CASES = [  # grid, patch, periodic: nothing here that 2, 3 and 4 ranks all divide
    ((12, 8), (4, 4), (True, True)),
    ((6, 9), (3, 3), (False, True)),
    ((4, 15), (4, 3), (True, False)),
    ((4, 6, 10), (2, 3, 5), (True, True, True)),
    ((6, 4, 4), (2, 2, 4), (True, False, True)),
]

TRANSPORTS = ["host", "cuda-aware", "torch"]


def connect(comm: Communicator, transport: str) -> Communicator:
    """Let a transport carry tensors of the CPU, ``cuda-aware`` too, which is refused there otherwise. Collective."""
    comm.connect("torch" if transport == "torch" else "host", torch.device("cpu"))
    if transport == "cuda-aware":
        comm.transport = CudaAwareTransport(comm.raw, comm.raw)
    return comm


def random_field(samples: int, channels: int, grid: tuple[int, ...], seed: int = 0) -> Tensor:
    """The same white noise on all ranks, double precision."""
    return torch.randn(samples, channels, *grid, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def smooth_fields(samples: int, channels: int, grid: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Gaussian random fields with spectrum (1 + (k/2)²)^-2 and unit variance, ``[sample, channel, *grid]``, float32."""
    axes = tuple(range(2, 2 + len(grid)))
    k = np.meshgrid(*[np.fft.fftfreq(n) * n for n in grid], indexing="ij")
    spectrum = (1 + sum(a**2 for a in k) / 4) ** -2.0
    noise = np.random.default_rng(seed).standard_normal((samples, channels, *grid))
    fields = np.fft.ifftn(np.fft.fftn(noise, axes=axes) * np.sqrt(spectrum / spectrum.mean()), axes=axes).real
    return fields.astype(np.float32)


def write_fields(path: Path, samples: int = 6, channels: int = 2, grid: tuple[int, ...] = (16, 24), seed: int = 0) -> Path:
    """A data file of smooth periodic fields."""
    names = tuple("uvw"[:channels])
    header = VolumeHeader(samples, names, grid, (1.0,) * len(grid), (True,) * len(grid))
    write_volume(path, header, iter(smooth_fields(samples, channels, grid, seed)))
    return path


def unit_field(channels: int, ndim: int) -> Field:
    """White data of unit deviation, for networks that are made without data."""
    size = channels * 3**ndim
    stencil = tuple(tuple(float(i == j) for j in range(size)) for i in range(size))
    affine = Normalisation((0.0,) * channels, (1.0,) * channels)
    return Field(tuple("uvw"[:channels]), (1.0,) * ndim, affine, 0.01, 100.0, stencil, ((1.0,), (1.0,)))


def field_of(power: Tensor, channels: int, reach: tuple[int, ...], waves: tuple[int, ...]) -> Field:
    """Unit fields with independent channels of that spectrum: their exact moments, without sampling.

    Arguments:
        power: Variance of every orthonormal mode, ``[*grid]``.
        channels: Number of them.
        reach: Halo of the stencil per axis.
        waves: Largest wave number of the coarse part per axis.
    """
    near, low = torch.fft.ifftn(power).real, power
    for axis, (points, n, k) in enumerate(zip(power.shape, reach, waves, strict=True)):
        near = near.index_select(axis, torch.arange(-2 * n, 2 * n + 1) % points)
        low = low.index_select(axis, torch.arange(-k if axis < power.ndim - 1 else 0, k + 1) % points)
    moments = (torch.einsum("ab,...->ab...", torch.eye(channels, dtype=torch.float64), part) for part in (near, low))
    covariance, spectrum = moments
    found = Moments(covariance, torch.view_as_real(spectrum.to(torch.complex128)))
    return dataclasses.replace(unit_field(channels, power.ndim), moments=found, grid=tuple(power.shape))


def small_config(data: Path, dtype: str = "float64", **sections: dict[str, object]) -> Config:
    """A model of a few thousand parameters on 2 × 3 patches of 8 × 8 points."""
    tree: dict[str, dict[str, object]] = {
        "domain": {"patch": [8, 8]},
        "data": {"path": str(data)},
        "model": {"channels": [8, 8], "token_channels": 4, "coarse_width": 16, "coarse_layers": 2, "coarse_heads": 2},
        "train": {"steps": 5, "batch": 2, "warmup": 0, "dtype": dtype, "log_every": 1, "checkpoint_every": 100},
    }
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    return build(tree, "test")
