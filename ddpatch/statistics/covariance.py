"""Second moments of the training fields, by Fourier mode and by displacement: what the exact linear denoiser is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ddpatch.data.normalisation import Normalisation
from ddpatch.parallel.comm import Communicator
from ddpatch.statistics.slabs import Crops, Fields
from ddpatch.statistics.spectrum import Spectrum


class Moments(NamedTuple):
    """What :func:`measure_moments` finds, in double precision.

    Attributes:
        lags: C_ab(r) = <x_a(p) x_b(p + r)>, with shape ``[channel, channel, *(2 L + 1)]``; r = 0 in the middle.
        power: P_ab(k) = <x̂_a x̂_b*> with x̂ = fftn(x, norm="ortho"), real and imaginary parts, with shape
            ``[channel, channel, *(2 K + 1), K + 1, 2]``: wave numbers -K..K, along the last axis 0..K.
    """

    lags: Tensor
    power: Tensor


def measure_moments(
    file: Fields,
    samples: Sequence[int],
    grid: Sequence[int],
    normalisation: Normalisation,
    lags: Sequence[int],
    modes: Sequence[int],
    comm: Communicator,
) -> Moments:
    """Moments of the normalised fields, averaged over positions and samples. Collective.

    Arguments:
        file: The fields.
        samples: Samples to average over.
        grid: Points of the box to take from the start of each sample. An axis that is cut is not periodic: see
            :mod:`ddpatch.statistics.spectrum`.
        normalisation: Applied to what is read.
        lags: L, the largest displacement per axis; 0 where the field does not close on itself.
        modes: K, the largest wave number per axis.
        comm: The ranks that share the transform; any number.
    """
    crops = Crops(file, tuple(grid))
    header = crops.header
    spectrum = Spectrum(header.grid_shape, header.spacing, header.periodic, comm)
    waves, channels = spectrum.fft.wavenumbers(), len(header.channels)
    points = math.prod(grid)
    found_lags = torch.zeros(channels, channels, *(2 * n + 1 for n in lags), dtype=torch.float64)
    found_power = torch.zeros(channels, channels, *(2 * n + 1 for n in modes[:-1]), modes[-1] + 1, dtype=torch.complex128)
    turns = [_turns(k, n, m) for k, n, m in zip(waves, grid, lags, strict=True)]
    for sample in samples:
        x = [_normalised(spectrum, crops, sample * math.prod(crops.counts), c, normalisation) for c in range(channels)]
        for a, b in product(range(channels), repeat=2):
            pair = x[a] * x[b].conj() * (points / len(samples))
            found_lags[a, b] += _displaced(pair.conj() * spectrum.weights, turns) / points
            found_power[a, b] += _lowest(pair, waves, modes)
    return Moments(comm.allreduce_(found_lags), comm.allreduce_(torch.view_as_real(found_power)))


def _normalised(spectrum: Spectrum, fields: Fields, sample: int, channel: int, normalisation: Normalisation) -> Tensor:
    """Modes of a normalised channel. Where a window is applied, the mean is that of the sample."""
    mode = spectrum.read(fields, sample, channel)
    if all(spectrum.periodic):
        mode = mode - torch.where(spectrum.square == 0, normalisation.mean[channel], 0.0)
    return mode / normalisation.std[channel]


def _turns(wavenumbers: Tensor, points: int, lag: int) -> Tensor:
    """exp(i k r) along an axis, with shape ``[mode, 2 L + 1]``."""
    angles = wavenumbers.flatten()[:, None] * torch.arange(-lag, lag + 1, dtype=torch.float64) * (2 * math.pi / points)
    return torch.polar(torch.ones_like(angles), angles)


def _displaced(modes: Tensor, turns: Sequence[Tensor]) -> Tensor:
    """Re Σ_k modes(k) exp(i k·r) for small displacements, with shape ``[*(2 L + 1)]``."""
    for turn in turns:  # the axis in front is summed over, and its displacements come last
        modes = torch.tensordot(modes, turn, dims=([0], [0]))
    return modes.real


def _lowest(modes: Tensor, waves: Sequence[Tensor], most: Sequence[int]) -> Tensor:
    """This rank's part of the modes with wave numbers -K..K, along the last axis 0..K."""
    low = torch.zeros(*(2 * n + 1 for n in most[:-1]), most[-1] + 1, dtype=modes.dtype)
    kept = [(k.flatten().abs() <= n).nonzero().flatten() for k, n in zip(waves, most, strict=True)]
    places = [k.flatten()[i].long() for k, i in zip(waves, kept, strict=True)]
    places = [p + n for p, n in zip(places[:-1], most[:-1], strict=True)] + places[-1:]
    low[torch.meshgrid(*places, indexing="ij")] = modes[torch.meshgrid(*kept, indexing="ij")]
    return low
