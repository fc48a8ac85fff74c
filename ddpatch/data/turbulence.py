"""Forced homogeneous isotropic turbulence in three dimensions, by a pseudo-spectral method."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ddpatch.data.spectral import SpectralGrid

POWER = 0.1
FORCED = 2.5  # modes 0 < |k| <= FORCED receive the power
RESOLUTION = 1.3  # k_max η of the default viscosity, with k_max = points / 3


def resolved_viscosity(points: int, power: float = POWER) -> float:
    """The viscosity with which the grid resolves the flow: k_max η = 1.3, where η = (ν³/P)^(1/4) is the Kolmogorov length."""
    return float(((RESOLUTION * 3 / points) ** 4 * power) ** (1 / 3))


class IsotropicTurbulence:
    """The Navier-Stokes equations in a periodic box of side 2π, fed a constant power at large scales.

    ∂u/∂t + ∇·(uu) = -∇p + ν∇²u + f,  ∇·u = 0,  f̂ = P û / (2 E_low) on 0 < |k| <= 2.5 and 0 elsewhere,

    where E_low is the energy of the forced modes, so that dE/dt = P - ε at all times. Six products less their trace are
    transformed (Basdevant, J. Comput. Phys. 50, 1983): 3 inverse and 5 forward transforms per tendency. The state is the
    velocity's modes, with shape ``[3, *grid.modes]``; component 0 lies along x, which is the last axis of the grid.

    Arguments:
        grid: Three-dimensional grid.
        viscosity: Kinematic viscosity ν.
        power: Power P per unit mass; 0 lets the flow decay.
    """

    spin_up = 3

    def __init__(self, grid: SpectralGrid, viscosity: float, power: float = POWER) -> None:
        self.grid, self.viscosity, self.power = grid, viscosity, power
        self.damping = viscosity * grid.square
        self.forced = ((grid.square > 0) & (grid.square <= FORCED**2)).to(grid.dtype)
        self.inverse_square = 1 / grid.square.clamp(min=1)
        self.interval = 3 * (FORCED**2 * (power or POWER)) ** (-1 / 3)

    def tendency(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """N(û) = -P(k) [i k_j (u_i u_j)^] + f̂, and the velocity in physical space."""
        velocity = self.grid.inverse(state)
        dx, dy, dz = self.grid.gradient
        xx, yy, xy, xz, yz = self.grid.forward(_traceless_products(velocity))
        slope = torch.empty_like(state)
        torch.mul(dx, xx, out=slope[0]).addcmul_(dy, xy).addcmul_(dz, xz)
        torch.mul(dx, xy, out=slope[1]).addcmul_(dy, yy).addcmul_(dz, yz)
        torch.mul(dx, xz, out=slope[2]).addcmul_(dy, yz)
        slope = self.project(slope).neg_()
        return (slope.add_(self.force(state)) if self.power else slope), velocity

    def force(self, state: Tensor) -> Tensor:
        """f̂ = P û / (2 E_low), with the shape of the state."""
        low = self.forced * state
        return low.mul_(self.power / self.grid.mean_product(low, low))

    def project(self, state: Tensor) -> Tensor:
        """The solenoidal part, û - k (k·û) / k², in place."""
        gradient = self.grid.gradient
        divergence = gradient[0] * state[0] + gradient[1] * state[1] + gradient[2] * state[2]
        return state.addcmul_(gradient, divergence.mul_(self.inverse_square))

    def initial(self, draw: np.random.Generator) -> Tensor:
        """A Gaussian solenoidal field with Pao's spectrum, E(k) = 1.5 P^(2/3) k^(-5/3) exp(-2.25 (kη)^(4/3)).

        White noise, projected, has the energy points^-3 per mode; a mode shall have E(k) / 4πk².
        """
        power = self.power or POWER
        wavenumber = self.grid.square.sqrt().clamp(min=1)
        eta = (self.viscosity**3 / power) ** 0.25
        energy = 1.5 * power ** (2 / 3) * wavenumber ** (-5 / 3) * torch.exp(-2.25 * (wavenumber * eta) ** (4 / 3))
        amplitude = torch.sqrt(energy * self.grid.points**3 / (4 * math.pi * wavenumber**2)) * (self.grid.square > 0)
        return self.project(self.grid.white_noise(3, draw) * amplitude)

    def refresh(self, state: Tensor) -> Tensor:
        """The state made real and solenoidal to round-off."""
        return self.project(self.grid.forward(self.grid.inverse(state)))

    def velocity(self, state: Tensor) -> Tensor:
        """Velocity (u, v, w) along x, y, z, with shape ``[3, *grid.shape]``."""
        return self.grid.inverse(state)

    def vorticity(self, state: Tensor) -> Tensor:
        """The curl of the velocity along x, y, z, with shape ``[3, *grid.shape]``."""
        return self.grid.inverse(torch.linalg.cross(self.grid.gradient, state, dim=0))

    def energy(self, state: Tensor) -> float:
        """Kinetic energy per unit mass, E = <u·u> / 2."""
        return 0.5 * self.grid.mean_product(state, state).item()

    def dissipation(self, state: Tensor) -> float:
        """Dissipation per unit mass, ε = ν <|∇u|²>."""
        return self.grid.mean_product(state, self.damping * state).item()

    def integral_scale(self, state: Tensor) -> float:
        """Integral length, L = π / (2u'²) Σ_k E(k) / k, summed over modes."""
        length = self.grid.mean_product(state, state * self.inverse_square.sqrt()).item() / 2
        return 0.75 * math.pi * length / self.energy(state)

    def statistics(self, state: Tensor) -> dict[str, float]:
        """Energy, dissipation, large-eddy turnover time L/u', and Re_λ = u'λ/ν with λ² = 15νu'²/ε (Pope, 2000)."""
        energy, dissipation = self.energy(state), self.dissipation(state)
        rms = math.sqrt(2 * energy / 3)
        return {
            "energy": energy,
            "dissipation": dissipation,
            "eddy_turnover_time": self.integral_scale(state) / rms,
            "reynolds_lambda": rms**2 * math.sqrt(15 / (self.viscosity * dissipation)),
        }

    def attributes(self) -> dict[str, str | float]:
        """Equations, parameters and solver."""
        return {
            "equations": "incompressible Navier-Stokes, forced homogeneous isotropic turbulence, periodic box of side 2 pi",
            "forcing": f"constant power on 0 < |k| <= {FORCED}, parallel to the velocity",
            "solver": "pseudo-spectral, 2/3 dealiasing, RK4 with integrating factor",
            "viscosity": self.viscosity,
            "power": self.power,
            "kmax_eta": self.grid.points / 3 * (self.viscosity**3 / (self.power or POWER)) ** 0.25,
        }


def _traceless_products(velocity: Tensor) -> Tensor:
    u, v, w = velocity
    products = velocity.new_empty(5, *velocity.shape[1:])
    squared = w * w
    torch.mul(u, u, out=products[0]).sub_(squared)
    torch.mul(v, v, out=products[1]).sub_(squared)
    torch.mul(u, v, out=products[2])
    torch.mul(u, w, out=products[3])
    torch.mul(v, w, out=products[4])
    return products
