"""From cells to points, with one small matrix per axis, and the sum of what is interpolated and what is there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Interpolation(NamedTuple):
    """Values on cells, and how points are interpolated from them: y(j) = Σ_i x(i) Π_a M_a(i_a, j_a).

    Attributes:
        values: x, with shape ``[batch, *cells, channel]``.
        matrices: M_a of every axis, with shape ``[cells, points]``.
    """

    values: Tensor
    matrices: Sequence[Tensor]

    def points(self) -> Tensor:
        """y, with shape ``[batch, channel, *points]``, channels last in memory."""
        return along(self.but_first(), 1, self.matrices[0]).movedim(-1, 1)

    def but_first(self) -> Tensor:
        """What the first axis is still to be interpolated of, with shape ``[batch, cells, *points of the others, channel]``."""
        x = self.values
        for axis, matrix in enumerate(self.matrices[1:], start=2):
            x = along(x, axis, matrix)
        return x


def along(x: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """y(.., j, ..) = Σ_i x(.., i, ..) M(i, j) along one axis, without a copy of what lies in memory in the order of its axes.

    Arguments:
        x: Shape ``[*before, i, *behind]``.
        axis: Number of the axis.
        matrix: M, with shape ``[i, j]``.

    Returns:
        Shape ``[*before, j, *behind]``, contiguous.
    """
    matrix = matrix.to(x)
    if axis == x.ndim - 1:
        return x @ matrix
    before, behind = x.shape[:axis], x.shape[axis + 1 :]
    return (matrix.T @ x.reshape(before.numel(), x.shape[axis], behind.numel())).view(*before, -1, *behind)


def doubled(x: Tensor, wraps: bool = False, rim: int = 0) -> Interpolation:
    """Linear interpolation of cell values to half the spacing, extrapolated to the outermost points: exact for linear functions.

    Arguments:
        x: Shape ``[batch, channel, *cells]``; there are twice as many points on every axis.
        wraps: Whether the cells close on themselves, so that there are no outermost ones.
        rim: Points to add on every side, with the values of the outermost ones.
    """
    return Interpolation(x.movedim(1, -1), [halving(n, wraps, rim, x.device) for n in x.shape[2:]])


def halving(cells: int, wraps: bool, rim: int, device: torch.device) -> Tensor:
    """Weights of the two nearest cells for every new point, with shape ``[cells, 2 cells + 2 rim]``.

    Made where they are wanted, since a device would wait for a copy; not kept, since compilers look through caches.
    """
    new, own = torch.arange(-rim, 2 * cells + rim, device=device), torch.arange(cells, device=device)[:, None]
    points = ((new if wraps else new.clamp(0, 2 * cells - 1)) + 0.5).double() / 2 - 0.5
    left = points.floor() if wraps else points.floor().clamp(0, max(cells - 2, 0))
    first, second = ((cell.long() % cells == own).double() for cell in (left, left + 1))
    return first * (1 - (points - left)) + second * (points - left)


def map_rows(x: Tensor, weights: Tensor, bias: Tensor | None = None) -> Tensor:
    """W_s x + b at every point of a sample s.

    Arguments:
        x: Shape ``[sample * patch, inputs, *points]``, best with channels last in memory.
        weights: W, with shape ``[sample, outputs, inputs]``.
        bias: b, with shape ``[outputs]``.

    Returns:
        Shape ``[sample * patch, outputs, *points]``, channels last.
    """
    rows = as_rows(x, len(weights))
    mapped = rows @ weights.mT if bias is None else torch.baddbmm(bias.to(x.dtype), rows, weights.mT)
    return mapped.view(len(x), *x.shape[2:], -1).movedim(-1, 1)


def merge(x: Tensor, weights: Tensor, bias: Tensor, parts: Sequence[Interpolation]) -> Tensor:
    """:func:`map_rows` of features, plus what is interpolated to their points: the product along the first axis adds to the map
    where it lies, so that what is interpolated is never in memory.

    Arguments:
        x, weights, bias: As there.
        parts: One or more, of the same points and channels.

    Returns:
        Shape ``[sample * patch, outputs, *points]``, channels last.
    """
    cells = [part.but_first().to(x.dtype).flatten(2) for part in parts]
    matrices = [part.matrices[0].to(part.values.device, x.dtype) for part in parts]
    compute = _Merge.apply if torch.is_grad_enabled() else _merged  # compilers do not follow the former without gradients
    merged = compute(as_rows(x, len(weights)), weights.mT, bias.to(x.dtype), *cells, *matrices)
    return merged.view(len(x), *x.shape[2:], -1).movedim(-1, 1)


def as_rows(x: Tensor, samples: int) -> Tensor:
    """``[sample * patch, channel, *points]`` as ``[sample, patch * points, channel]``."""
    return x.movedim(1, -1).reshape(samples, -1, x.shape[1])


def _merged(x: Tensor, weights: Tensor, bias: Tensor, *cells_and_matrices: Tensor) -> Tensor:
    """y = x W + b, to which z M of every part is added in place along another axis.

    One product for all parts would need them side by side in memory, and their gradients apart.
    """
    parts = len(cells_and_matrices) // 2
    merged = torch.baddbmm(bias, x, weights)
    for z, matrix in zip(cells_and_matrices[:parts], cells_and_matrices[parts:], strict=True):
        merged.view(len(z), matrix.shape[1], -1).baddbmm_(matrix.T.expand(len(z), -1, -1), z)
    return merged


class _Merge(torch.autograd.Function):
    """The same with gradients: autograd would copy them where views change."""

    forward = staticmethod(_merged)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, weights, _, *cells_and_matrices = inputs
        ctx.save_for_backward(x, weights, *cells_and_matrices[len(cells_and_matrices) // 2 :])
        ctx.batch = len(cells_and_matrices[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, *matrices = ctx.saved_tensors
        grad = grads[0].contiguous()
        of_cells = [matrix @ grad.view(ctx.batch, matrix.shape[1], -1) for matrix in matrices]
        return grad @ weights.mT, x.mT @ grad, grad.sum((0, 1)), *of_cells, *[None] * len(matrices)
