"""Kolmogorov flow: two-dimensional turbulence driven by a sinusoidal force, by a pseudo-spectral method."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ddpatch.data.spectral import SpectralGrid

WAVENUMBER = 4
DRAG = 0.1


def resolved_viscosity(points: int) -> float:
    """The viscosity with which the grid resolves the flow: 5e-4 at 256², and proportional to points^-2.

    The enstrophy cascade at rate χ ends at the length (ν³/χ)^(1/6), which shrinks like ν^(1/2) where χ is set by the force.
    """
    return 5e-4 * (256 / points) ** 2


class KolmogorovFlow:
    """The Navier-Stokes equations on a periodic square of side 2π, with the force sin(4y) along x and linear drag.

    ∂ω/∂t + u·∇ω = ν∇²ω - αω - 4 cos(4y),  ∇²ψ = -ω,  u = (∂ψ/∂y, -∂ψ/∂x)

    (Kochkov et al., PNAS 118, 2021). The transport term is computed as (∂²_x - ∂²_y)(uv) + ∂_x ∂_y (v² - u²) (Basdevant,
    J. Comput. Phys. 50, 1983): 2 inverse and 2 forward transforms per tendency. The state is the vorticity's modes, with
    shape ``[*grid.modes]``.

    Arguments:
        grid: Two-dimensional grid.
        viscosity: Kinematic viscosity ν.
        drag: Rate of the drag, α.
        amplitude: Amplitude of the force; 0 lets the flow decay.
    """

    interval = 4.0
    spin_up = 6

    def __init__(self, grid: SpectralGrid, viscosity: float, drag: float = DRAG, amplitude: float = 1.0) -> None:
        self.grid, self.viscosity, self.drag, self.amplitude = grid, viscosity, drag, amplitude
        self.damping = viscosity * grid.square + drag
        self.inverse_square = 1 / grid.square.clamp(min=1)
        dx, dy = grid.gradient
        self.curl_inverse = torch.stack((dy, -dx)) * self.inverse_square
        self.product_factors = torch.stack((dy**2 - dx**2, -dx * dy))
        y = torch.arange(grid.points, dtype=grid.dtype, device=grid.device) * (2 * math.pi / grid.points)
        force = -amplitude * WAVENUMBER * torch.cos(WAVENUMBER * y)
        self.forcing = grid.forward(force[:, None].expand(grid.shape).contiguous())

    def tendency(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """N(ω̂) = (k_x² - k_y²) (uv)^ + k_x k_y (v² - u²)^ + (curl f)^, and the velocity in physical space."""
        velocity = self.velocity(state)
        u, v = velocity
        cross, difference = self.grid.forward(torch.stack((u * v, v * v - u * u)))
        slope = torch.addcmul(self.forcing, self.product_factors[0], cross)
        return slope.addcmul_(self.product_factors[1], difference), velocity

    def initial(self, draw: np.random.Generator) -> Tensor:
        """Gaussian vorticity around the force's scale, with spectrum exp(-(|k| - 4)² / 4) and unit root mean square."""
        wavenumber = self.grid.square.sqrt()
        shape = torch.exp(-((wavenumber - WAVENUMBER) ** 2) / 8) * (self.grid.square > 0)
        state = self.grid.white_noise(1, draw)[0] * shape
        return state / self.grid.mean_product(state, state).sqrt()

    def refresh(self, state: Tensor) -> Tensor:
        """The state made real to round-off."""
        return self.grid.forward(self.grid.inverse(state))

    def velocity(self, state: Tensor) -> Tensor:
        """Velocity (u, v) along x, y, with shape ``[2, *grid.shape]``: û = i k_y ω̂ / k², v̂ = -i k_x ω̂ / k²."""
        return self.grid.inverse(self.curl_inverse * state)

    def vorticity(self, state: Tensor) -> Tensor:
        """The vorticity ∂v/∂x - ∂u/∂y, with shape ``[1, *grid.shape]``."""
        return self.grid.inverse(state[None])

    def energy(self, state: Tensor) -> float:
        """Kinetic energy per unit mass, E = <ω ψ> / 2."""
        return 0.5 * self.grid.mean_product(state, self.inverse_square * state).item()

    def power(self, state: Tensor) -> float:
        """Power of the force per unit mass, <u sin 4y> = <ψ curl f>."""
        return self.grid.mean_product(state, self.inverse_square * self.forcing).item()

    def statistics(self, state: Tensor) -> dict[str, float]:
        """Energy, enstrophy <ω²>/2, viscous dissipation ν<ω²>, and the time of turnover of an eddy, 1 / rms(ω)."""
        square = self.grid.mean_product(state, state).item()
        return {
            "energy": self.energy(state),
            "enstrophy": square / 2,
            "dissipation": self.viscosity * square,
            "eddy_turnover_time": 1 / math.sqrt(square),
        }

    def attributes(self) -> dict[str, str | float]:
        """Equations, parameters and solver."""
        return {
            "equations": "two-dimensional incompressible Navier-Stokes, Kolmogorov flow, periodic square of side 2 pi",
            "forcing": f"{self.amplitude:g} sin({WAVENUMBER} y) along x, linear drag",
            "solver": "pseudo-spectral, 2/3 dealiasing, RK4 with integrating factor",
            "viscosity": self.viscosity,
            "drag": self.drag,
        }
