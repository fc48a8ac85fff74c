"""Energy spectra by distributed FFT, and what follows from the Fourier modes: mode deviations and the spectral divergence.

Along an axis that is not periodic the field is multiplied by a Hann window of unit mean square, after its mean over the grid is
removed: without the window the jump between the two ends would leak over all wave numbers. The sum over the shells is then the
energy of the windowed fluctuation, and features narrower than two shells are smeared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpatch.parallel.comm import Communicator
from ddpatch.parallel.fft import SlabFFT
from ddpatch.statistics.slabs import Crops, Fields

ROUNDING = 1e-9  # keeps |k| = n + 1/2 in shell n + 1 where the sides of the grid are not commensurable in floating point


class Spectrum:
    """Sums over spherical shells k - 1/2 <= |k| < k + 1/2 of the modes of one grid.

    Arguments:
        grid_shape: Points of the grid.
        spacing: Distance between points along each axis.
        periodic: Axes that are transformed without a window.
        comm: The ranks that share the transform.
        unit: Wave number of shell 1 in radians per length. Default: 2π over the longest side of the grid.
    """

    def __init__(
        self,
        grid_shape: Sequence[int],
        spacing: Sequence[float],
        periodic: Sequence[bool],
        comm: Communicator,
        unit: float | None = None,
    ) -> None:
        self.fft, self.periodic = SlabFFT(grid_shape, comm), tuple(periodic)
        self.unit = fundamental(grid_shape, spacing) if unit is None else unit
        scales = [2 * math.pi / (n * h) / self.unit for n, h in zip(grid_shape, spacing, strict=True)]
        self.waves = [k * s for k, s in zip(self.fft.wavenumbers(), scales, strict=True)]
        self.square = sum((k**2 for k in self.waves), torch.zeros((), dtype=torch.float64))
        self.shell = (self.square.sqrt() + 0.5 + ROUNDING).floor().long()
        self.shells = int(math.sqrt(sum((n // 2 * s) ** 2 for n, s in zip(grid_shape, scales, strict=True))) + 0.5 + ROUNDING) + 1
        self.weights = self.fft.weights().expand(self.shell.shape)

    def read(self, fields: Fields, sample: int, channel: int) -> Tensor:
        """The Fourier coefficients û = fftn(u) / N of one channel, with the shape of ``SlabFFT.forward``. Collective."""
        shape, slab = self.fft.grid_shape, self.fft.slab
        u = torch.zeros((len(slab), *shape[1:]), dtype=torch.float64)
        if len(slab):
            box = fields.read(sample, [slab.start] + [0] * (len(shape) - 1), u.shape, [channel])
            u = torch.from_numpy(np.asarray(box[0], dtype=np.float64))
        return self.fft.forward(self._windowed(u))

    def _windowed(self, u: Tensor) -> Tensor:
        if all(self.periodic):
            return u
        u = u - self.fft.comm.allreduce_(u.sum()) / math.prod(self.fft.grid_shape)
        for axis, (n, wraps) in enumerate(zip(self.fft.grid_shape, self.periodic, strict=True)):
            if not wraps:
                window = hann(n)[self.fft.slab.start : self.fft.slab.stop] if axis == 0 else hann(n)
                u = u * window.reshape([-1 if i == axis else 1 for i in range(u.ndim)])
        return u

    def shell_sums(self, values: Tensor) -> Tensor:
        """This rank's part of the sum of a real quantity over the modes of every shell of the full spectrum, ``[shell]``."""
        return torch.bincount(self.shell.flatten(), (values * self.weights).flatten(), minlength=self.shells)

    def energy(self, fields: Fields, sample: int) -> Tensor:
        """This rank's part of the energy spectrum E(k) = 1/2 Σ_shell |û|², summed over channels, with shape ``[shell]``.

        On periodic grids Σ_k E(k) = <|u|²> / 2. Collective.
        """
        energy = torch.zeros(self.shells, dtype=torch.float64)
        for channel in range(len(fields.header.channels)):
            energy += self.shell_sums(self.read(fields, sample, channel).abs() ** 2 / 2)
        return energy

    def energy_and_divergence(self, fields: Fields, sample: int) -> tuple[Tensor, Tensor]:
        """This rank's part of the energy spectrum ``[shell]`` and of (Σ |k·û|², Σ |k|²|û|²) of a velocity. Collective.

        Channel c is the component along axis ``ndim - 1 - c``. Modes at a Nyquist wave number, whose derivative has no sign,
        are left out of the second result.
        """
        energy = torch.zeros(self.shells, dtype=torch.float64)
        along = torch.zeros(self.shell.shape, dtype=torch.complex128)
        square = torch.zeros(self.shell.shape, dtype=torch.float64)
        for channel, wave in enumerate(reversed(self.waves)):
            mode = self.read(fields, sample, channel)
            energy += self.shell_sums(mode.abs() ** 2 / 2)
            along += wave * mode
            square += mode.abs() ** 2
        return energy, torch.stack([self._resolved(along.abs() ** 2), self._resolved(square * self.square)])

    def _resolved(self, values: Tensor) -> Tensor:
        values = values * self.weights
        for n, k in zip(self.fft.grid_shape, self.fft.wavenumbers(), strict=True):
            values = torch.where(2 * k.abs() == n, 0.0, values)
        return values.sum()


def fundamental(grid_shape: Sequence[int], spacing: Sequence[float]) -> float:
    """The smallest wave number of a grid: 2π over its longest side."""
    return 2 * math.pi / max(n * h for n, h in zip(grid_shape, spacing, strict=True))


def hann(points: int) -> Tensor:
    """The Hann window of unit mean square, sampled between the ends, with shape ``[points]``."""
    window = torch.sin(math.pi * (torch.arange(points, dtype=torch.float64) + 0.5) / points) ** 2
    return window / window.square().mean().sqrt()


class ModeSpectrum(NamedTuple):
    """What :func:`mode_deviation` finds, both with shape ``[shell]``.

    Attributes:
        deviation: Standard deviation s of an orthonormal Fourier mode.
        modes: Number of modes.
    """

    deviation: Tensor
    modes: Tensor


def mode_deviation(
    file: Fields,
    samples: Sequence[int],
    comm: Communicator,
    grid: Sequence[int] | None = None,
    mean: np.ndarray | None = None,
    std: np.ndarray | None = None,
) -> ModeSpectrum:
    """The standard deviation of an orthonormal Fourier mode of the (normalised) fields, by shell. Collective.

        s(k) = sqrt(<|x̂|²>),   x̂ = fftn((u - mean) / std, norm="ortho"),

    averaged over the modes of the shell, the samples and the channels. In these coordinates white noise of level σ has
    deviation σ in every mode, so s(k) against σ is the signal-to-noise ratio that sets the range of noise levels.

    Arguments:
        file: The fields.
        samples: Numbers of the samples to average over.
        comm: The ranks that share the transform; any number.
        grid: Points of the box to take from the start of each sample. Default: the whole grid. An axis that is cut is not
            periodic and gets a Hann window.
        mean, std: What the data are normalised with, each with shape ``[channel]``: mean and standard deviation over these
            samples. Default: 0 and 1.

    Returns:
        s and the number of modes, by shell, in units of the smallest wave number; 0 where a shell has no mode. s(0) is that
        of the mean over the grid, which a window removes.
    """
    crops = Crops(file, tuple(file.header.grid_shape if grid is None else grid))
    header = crops.header
    spectrum = Spectrum(header.grid_shape, header.spacing, header.periodic, comm)
    scales = np.ones(len(header.channels)) if std is None else np.asarray(std, dtype=np.float64)
    offsets = np.zeros(len(header.channels)) if mean is None or not all(header.periodic) else np.asarray(mean) / scales
    total = torch.zeros(spectrum.shells, dtype=torch.float64)
    for sample in samples:
        for channel, scale in enumerate(scales):
            mode = spectrum.read(crops, sample * math.prod(crops.counts), channel)
            total += spectrum.shell_sums(mode.abs() ** 2) / float(scale) ** 2
    total = comm.allreduce_(total) * math.prod(header.grid_shape) / (len(samples) * len(header.channels))
    modes = comm.allreduce_(spectrum.shell_sums(torch.ones(spectrum.shell.shape, dtype=torch.float64)))
    total[0] -= math.prod(header.grid_shape) * float(np.square(offsets).mean())
    return ModeSpectrum((total.clamp(min=0) / modes.clamp(min=1)).sqrt(), modes)
