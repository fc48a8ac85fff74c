"""Gradients by central differences of second order, and the divergence and vorticity of a velocity.

Channel c of a velocity is the component along axis ``ndim - 1 - c``: u along x, the last axis, then v along y, w along z.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gradient(values: Tensor, spacing: Sequence[float], periodic: Sequence[bool]) -> Tensor:
    """The gradient ∂_a u ≈ (u(x + h) - u(x - h)) / 2h at all points that have both neighbours.

    Arguments:
        values: Rows of axis 0 with a ring of one row, complete along the other axes, with shape ``[channel, *shape]``.
        spacing: h along each axis.
        periodic: Whether each axis closes on itself; axis 0 brings its ring and is never closed here.

    Returns:
        Shape ``[axis, channel, *inner]``: on axis 0, and on axes with walls, two points fewer than ``values``.
    """
    for axis, wraps in enumerate(periodic):
        if axis and wraps:
            first, last = values.narrow(1 + axis, 0, 1), values.narrow(1 + axis, values.shape[1 + axis] - 1, 1)
            values = torch.cat([last, values, first], dim=1 + axis)
    parts = []
    for axis, step in enumerate(spacing):
        inner = values
        for other in range(len(spacing)):
            if other != axis:
                inner = inner.narrow(1 + other, 1, max(0, inner.shape[1 + other] - 2))
        points = inner.shape[1 + axis]
        count = max(0, points - 2)
        jump = inner.narrow(1 + axis, points - count, count) - inner.narrow(1 + axis, 0, count)
        parts.append(jump / (2 * step))
    return torch.stack(parts)


def divergence(slopes: Tensor) -> Tensor:
    """The divergence of a velocity from its gradient ``[axis, channel, *shape]``, with shape ``[*shape]``."""
    ndim = len(slopes)
    return torch.stack([slopes[axis, ndim - 1 - axis] for axis in range(ndim)]).sum(0)


def vorticity(slopes: Tensor) -> Tensor:
    """The vorticity of a velocity from its gradient ``[axis, channel, *shape]``.

    Returns:
        ω = ∇ × u with shape ``[component, *shape]``: one component, ∂v/∂x - ∂u/∂y, in 2-D; ω_x, ω_y, ω_z in 3-D.
    """
    ndim = len(slopes)

    def slope(component: int, direction: int) -> Tensor:
        return slopes[ndim - 1 - direction, component]

    planes = [(0, 1)] if ndim == 2 else [(1, 2), (2, 0), (0, 1)]
    return torch.stack([slope(b, a) - slope(a, b) for a, b in planes])


def gradient_sums(slopes: Tensor) -> Tensor:
    """The sums of |∇·u|², of |∇u|² = Σ (∂_a u_b)², and of 1 over the points, with shape ``[3]``."""
    points = float(slopes[0, 0].numel())
    return torch.stack([divergence(slopes).square().sum(), slopes.square().sum(), torch.tensor(points, dtype=torch.float64)])
