"""What the pseudo-spectral solvers share: the resolved Fourier modes of a periodic box, and a time step with exact damping.

The box is ``[0, 2π)^d``, so that wavenumbers are integers. A state holds only the modes with ``|k_i| <= cutoff < points / 3``
(the 2/3 rule): products of two fields are then free of aliasing on every mode that is kept, there is no Nyquist mode, and in
three dimensions arithmetic on modes costs less than a third of what it would on the full transform.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ddpatch.errors import UserError

COURANT = 2.0  # RK4 is stable up to 2.8 on the imaginary axis


class SpectralGrid:
    """The grid of a periodic box of side 2π, and its resolved modes.

    Arguments:
        points: Points per axis.
        ndim: Number of axes, 2 or 3.
        dtype: Type of fields in physical space.
        device: Where the tensors live.

    Attributes:
        cutoff: Largest wavenumber kept on each axis.
        shape: Shape of a field, ``[(z,) y, x]``.
        modes: Shape of a transformed field, ``[(z,) y, x]`` with 2 cutoff + 1 rows, on the last axis cutoff + 1.
        gradient: Factors i k_x, i k_y(, i k_z) of the derivatives, with shape ``[d, *modes]``; x is the last axis of a field.
        square: k², with shape ``[*modes]``.
    """

    def __init__(self, points: int, ndim: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> None:
        self.points, self.ndim = points, ndim
        self.cutoff = (points - 1) // 3
        rows = 2 * self.cutoff + 1
        self.shape = (points,) * ndim
        self.modes = (rows,) * (ndim - 1) + (self.cutoff + 1,)
        line = torch.fft.fftfreq(rows, 1 / rows, dtype=dtype, device=device)
        axes = torch.meshgrid(*[line] * (ndim - 1), line[: self.cutoff + 1], indexing="ij")
        wavevector = torch.stack(axes[::-1])
        self.gradient = 1j * wavevector
        self.square = wavevector.square().sum(0)
        self.dtype, self.device = dtype, wavevector.device
        self._axes = tuple(range(-ndim, 0))
        self._padded: dict[tuple[int, ...], Tensor] = {}

    def forward(self, fields: Tensor) -> Tensor:
        """The resolved modes of some fields: û(k) = mean over the grid of u(x) exp(-i k·x).

        Arguments:
            fields: Tensor of shape ``[..., *shape]``.

        Returns:
            Tensor of shape ``[..., *modes]``.
        """
        full: Tensor = torch.fft.rfftn(fields, dim=self._axes, norm="forward")
        state: Tensor = full.new_empty(*fields.shape[: -self.ndim], *self.modes)
        for box in self._boxes():
            state[box] = full[box]
        return state

    def inverse(self, state: Tensor) -> Tensor:
        """The fields of some modes, with shape ``[..., *shape]``: the inverse of :meth:`forward` on resolved fields.

        Arguments:
            state: Tensor of shape ``[..., *modes]``.
        """
        lead = tuple(state.shape[: -self.ndim])
        if lead not in self._padded:
            self._padded[lead] = state.new_zeros(*lead, *self.shape[1:], self.points // 2 + 1)
        padded = self._padded[lead]
        for box in self._boxes():
            padded[box] = state[box]
        fields: Tensor = torch.fft.irfftn(padded, s=self.shape, dim=self._axes, norm="forward")
        return fields

    def mean_product(self, a: Tensor, b: Tensor) -> Tensor:
        """The mean over the box of a·b, summed over leading axes, by Parseval: Σ_k conj(â)·b̂.

        A stored mode stands for itself and its conjugate, unless k_x = 0, where both are stored.

        Arguments:
            a, b: Modes, with shape ``[..., *modes]``.
        """
        return 2 * torch.vdot(a.flatten(), b.flatten()).real - torch.vdot(a[..., 0].flatten(), b[..., 0].flatten()).real

    def white_noise(self, channels: int, draw: np.random.Generator) -> Tensor:
        """Modes of white noise of unit variance per grid point, with shape ``[channels, *modes]``; E|û|² = points^-d."""
        noise = draw.standard_normal((channels, *self.shape))
        return self.forward(torch.from_numpy(noise).to(self.device, self.dtype))

    def _boxes(self) -> list[tuple[Any, ...]]:
        halves = (slice(0, self.cutoff + 1), slice(-self.cutoff, None))
        return [(..., *rows, slice(0, self.cutoff + 1)) for rows in product(halves, repeat=self.ndim - 1)]


class Flow(Protocol):
    """An incompressible flow in a periodic box, ∂û/∂t = N(û) - damping û, where N is everything but the damping.

    Attributes:
        grid: The resolved modes.
        damping: Rate of decay of every mode, with shape ``[*grid.modes]``.
        interval: Time after which a snapshot tells something new.
        spin_up: Number of intervals until the initial state is forgotten.
    """

    grid: SpectralGrid
    damping: Tensor
    interval: float
    spin_up: int

    def tendency(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """N(û), with the shape of the state, and the velocity it was computed from, ``[component, *grid.shape]``."""

    def initial(self, draw: np.random.Generator) -> Tensor:
        """A random state to start from."""

    def refresh(self, state: Tensor) -> Tensor:
        """The state without the round-off that makes its field complex or compressible, which forcing could amplify."""

    def velocity(self, state: Tensor) -> Tensor:
        """Velocity components along x, y(, z), with shape ``[component, *grid.shape]``."""

    def vorticity(self, state: Tensor) -> Tensor:
        """The curl of the velocity, with shape ``[component, *grid.shape]``; one component in two dimensions."""

    def statistics(self, state: Tensor) -> dict[str, float]:
        """Numbers that describe the state, by name."""

    def attributes(self) -> dict[str, str | float]:
        """What defines the flow, for the provenance of a file."""


def step(flow: Flow, state: Tensor, slope: Tensor, dt: float) -> Tensor:
    """One step of the classical Runge-Kutta method of order 4 with an integrating factor for the damping.

    With E = exp(-damping dt/2) and k₁ = N(û):
    k₂ = N(E(û + dt/2 k₁)), k₃ = N(Eû + dt/2 k₂), k₄ = N(E(Eû + dt k₃)), û ← E(E(û + dt/6 k₁) + dt/3 (k₂ + k₃)) + dt/6 k₄
    (Canuto et al., Spectral Methods, 2007, appendix D).

    Arguments:
        flow: Tendency and damping.
        state: Modes û, with the shape that the flow's tendency takes.
        slope: N(û).
        dt: Time step.
    """
    decay = torch.exp(-0.5 * dt * flow.damping)
    decayed = decay * state
    second, _ = flow.tendency(decay * torch.add(state, slope, alpha=dt / 2))
    third, _ = flow.tendency(torch.add(decayed, second, alpha=dt / 2))
    fourth, _ = flow.tendency(decay * torch.add(decayed, third, alpha=dt))
    inner = decay * torch.add(state, slope, alpha=dt / 6)
    inner = inner.add_(second, alpha=dt / 3).add_(third, alpha=dt / 3).mul_(decay)
    return inner.add_(fourth, alpha=dt / 6)


def advance(flow: Flow, state: Tensor, duration: float, courant: float = COURANT) -> Tensor:
    """The state after ``duration``, in steps that adapt to the velocity: dt · cutoff · max_x Σ_i |u_i| <= courant.

    Raises:
        UserError: if the flow becomes infinite.
    """
    remaining = duration
    while remaining > 0:
        slope, velocity = flow.tendency(state)
        rate = flow.grid.cutoff * velocity.abs().sum(0).max().item()
        if not math.isfinite(rate):
            raise UserError("simulate: the velocity became infinite; choose a larger viscosity or a finer grid")
        steps = max(1, math.ceil(remaining * rate / courant))
        state = step(flow, state, slope, remaining / steps)
        remaining -= remaining / steps
    return state
