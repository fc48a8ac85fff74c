"""Muon: momentum whose matrices are orthogonalised before every step.

A weight of a convolution or linear layer is a matrix W of shape outputs × inputs. With the singular value decomposition
U S V^T of the momentum, the step is

    W ← W - η 0.2 sqrt(max(rows, columns)) U V^T,

so that all directions that the gradients point to advance alike, the strong ones and the weak; the factor gives the step the size
of Adam's (Liu et al., arXiv 2502.16982). U V^T is found by a polynomial iteration, in a few small matrix products. Vectors, and
the layers that the caller names, are left to Adam. Jordan et al., "Muon: an optimizer for hidden layers", 2024.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

ITERATION = (3.4445, -4.7750, 2.0315)  # x → a x + b x³ + c x⁵ drives singular values in (0, 1] to about 1
STEPS = 5


class Muon(torch.optim.Optimizer):
    """Muon for the matrices of a network, Adam for everything else.

    Arguments:
        parameters: Names and parameters, as ``named_parameters()`` gives them.
        lr: Learning rate η of both.
        adam: Parts of names whose matrices Adam updates too: first and last layers, embeddings.
        momentum: Of the matrices, with Nesterov's look ahead.
        betas: Of Adam.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        adam: Iterable[str] = (),
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:
        named, parts = list(parameters), tuple(adam)
        matrices = [p for name, p in named if p.ndim > 1 and not any(part in name for part in parts)]
        chosen = {id(p) for p in matrices}
        rest = [p for _, p in named if id(p) not in chosen]
        groups = [{"params": matrices, "matrices": True}, {"params": rest, "matrices": False}]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            update = self._turn if group["matrices"] else self._adam
            found = [(p, p.grad) for p in group["params"] if p.grad is not None]
            if found:
                parameters, grads = zip(*found, strict=True)
                update(parameters, grads, group)

    def _turn(self, parameters: tuple[Tensor, ...], grads: tuple[Tensor, ...], group: dict[str, Any]) -> None:
        for p, grad in zip(parameters, grads, strict=True):
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            mean: Tensor = state["momentum"].lerp_(grad, 1 - group["momentum"])
            matrix = grad.lerp(mean, group["momentum"]).flatten(1)
            p.add_(orthogonalise(matrix).view(p.shape), alpha=-group["lr"] * 0.2 * max(matrix.shape) ** 0.5)

    def _adam(self, parameters: tuple[Tensor, ...], grads: tuple[Tensor, ...], group: dict[str, Any]) -> None:
        """All at a time: they are small, and what one costs is the call."""
        states, (first, second) = [self.state[p] for p in parameters], group["betas"]
        for p, state in zip(parameters, states, strict=True):
            if not state:
                state.update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
            state["step"] += 1
        means, squares = ([state[key] for state in states] for key in ("mean", "square"))
        torch._foreach_lerp_(means, grads, 1 - first)
        torch._foreach_lerp_(squares, torch._foreach_mul(grads, grads), 1 - second)
        sizes = torch._foreach_sqrt(torch._foreach_div(squares, [1 - second ** s["step"] for s in states]))
        torch._foreach_add_(sizes, 1e-8)
        torch._foreach_addcdiv_(parameters, means, sizes, [-group["lr"] / (1 - first ** s["step"]) for s in states])


def orthogonalise(matrix: Tensor) -> Tensor:
    """U V^T of a matrix U S V^T, approximately: singular values between about 0.7 and 1.2.

    The iteration X ← (a + b A + c A²) X with A = X X^T makes polynomials in the first A of its factors, which commute. So the
    factors are multiplied, A ← (a + b A + c A²)² A, and what is as large as the matrix is a factor of two products only.

    Arguments:
        matrix: Shape ``[rows, columns]``.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalise(matrix.T).T
    x = matrix / (matrix.norm() + 1e-7)
    square = x @ x.T
    factor = product = _polynomial(square)
    for _ in range(STEPS - 1):
        square = factor @ square @ factor
        factor = _polynomial(square)
        product = factor @ product
    return product @ x


def _polynomial(square: Tensor) -> Tensor:
    a, b, c = ITERATION
    found = torch.addmm(square, square, square, beta=b, alpha=c)
    found.diagonal().add_(a)
    return found
