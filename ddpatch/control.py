"""A control variate for the energy of samples: that of Gaussian fields of the data's covariance, from the same noise.

The probability flow of a Gaussian field makes x̂(κ) = P(κ)^1/2 n̂(κ) of noise, P its covariance and κ the wave numbers. A denoiser
is near enough to a Gaussian field's for its samples to be strong where these are, and what these have is known:

    z = mean over shells k of  N Σ_κ n̂^H P n̂ / Σ_κ tr P,   n̂ = fftn(n) / N,   <z> = 1,

whatever P is, with N points. So y - β (z - 1) has the expectation of y, and with β = cov(y, z) / var(z) what is left of its
variance is 1 - corr(y, z)² (P. Glasserman, Monte Carlo Methods in Financial Engineering, 2003, section 4.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ddpatch.decomposition import Decomposition
from ddpatch.parallel.comm import Communicator
from ddpatch.random import Stream, patch_noise
from ddpatch.run import Field
from ddpatch.statistics.spectrum import Spectrum

FEWEST = 8  # samples that tell β


class Mean(NamedTuple):
    """A mean over samples.

    Attributes:
        value: The mean.
        error: Its standard error.
    """

    value: float
    error: float


def controlled_mean(y: Tensor, z: Tensor) -> Mean:
    """The mean of y, less what the chance in z explains; plain where there are fewer than 8 samples.

    Arguments:
        y: Of every sample, at least 2, with shape ``[sample]``.
        z: Likewise, with the expectation 1.
    """
    count, away = len(y), z - z.mean()
    slope = away @ y / away.square().sum() if count >= FEWEST else y.new_zeros(())
    left = y - y.mean() - slope * away
    fitted = 2 if count >= FEWEST else 1
    error = (left.square().sum() / (count - fitted) / count).sqrt()
    return Mean(float(y.mean() - slope * (z.mean() - 1)), float(error))


def gaussian_energies(
    field: Field, grid: Decomposition, samples: Sequence[int], seed: int, shells: int, comm: Communicator
) -> Tensor:
    """The energies of which z is the mean over shells. Collective.

    Arguments:
        field: What the samples are fields of, on the grid of the training.
        grid: That grid, cut into patches, which the noise is keyed by.
        samples: Global sample numbers; together with ``seed`` they name the noise, as in :meth:`ddpatch.sample.Sampler.draw`.
        seed: Of the series.
        shells: The last one; the first is 1.
        comm: The ranks that share the transform; any number.

    Returns:
        Shape ``[sample, shell]``, with the expectation 1.
    """
    spectrum = Spectrum(grid.grid_shape, field.spacing, grid.periodic, comm)
    power = covariance(field, spectrum)
    found = torch.stack([_weighted(power, _noise(field, grid, sample, seed, spectrum), spectrum) for sample in samples])
    trace = spectrum.shell_sums(power.diagonal(dim1=0, dim2=1).real.sum(-1))
    found, expected = comm.allreduce_(found), comm.allreduce_(trace) / grid.num_points
    return (found / expected)[:, 1 : shells + 1]


def covariance(field: Field, spectrum: Spectrum) -> Tensor:
    """P on this rank's modes, as far as a checkpoint has it: elsewhere the variance of the shell, in every channel.

    Returns:
        Shape ``[channel, channel, *modes]``, complex and in double precision.
    """
    channels, square = len(field.channels), torch.tensor(field.spectrum[0], dtype=torch.float64).square()
    unit = torch.eye(channels, dtype=torch.complex128).view(channels, channels, *(1,) * spectrum.shell.ndim)
    alike = unit * square[spectrum.shell.clamp(max=len(square) - 1)]
    if field.moments is None:
        return alike
    power, known, places = torch.view_as_complex(field.moments.power), torch.ones_like(spectrum.shell, dtype=torch.bool), []
    waves = spectrum.fft.wavenumbers()
    for axis, k in enumerate(waves):
        first = power.shape[2 + axis] // 2 if axis < len(waves) - 1 else 0
        most = power.shape[2 + axis] - 1 - first
        known &= k.abs() <= most
        places.append((k.long() + first).clamp(0, first + most))
    return torch.where(known, power[(slice(None), slice(None), *torch.broadcast_tensors(*places))], alike)


def _noise(field: Field, grid: Decomposition, sample: int, seed: int, spectrum: Spectrum) -> Tensor:
    """The Fourier coefficients of a sample's noise, with shape ``[channel, *modes]``. Collective."""
    slab, channels = spectrum.fft.slab, len(field.channels)
    noise = torch.zeros(channels, len(slab), *grid.grid_shape[1:], dtype=torch.float64)
    for patch in range(grid.num_patches):
        rows, *rest = grid.slices(patch)
        first, last = max(rows.start, slab.start), min(rows.stop, slab.stop)
        if first < last:
            drawn = patch_noise((channels, *grid.patch_shape), seed, Stream.SAMPLE, [sample], 0, [patch], torch.float64)[0, 0]
            place = (slice(None), slice(first - slab.start, last - slab.start), *rest)
            noise[place] = drawn[:, first - rows.start : last - rows.start]
    return spectrum.fft.forward(noise)


def _weighted(power: Tensor, modes: Tensor, spectrum: Spectrum) -> Tensor:
    """This rank's part of Σ_κ n̂^H P n̂, with shape ``[shell]``."""
    return spectrum.shell_sums(torch.einsum("a...,ab...,b...->...", modes.conj(), power, modes).real)
