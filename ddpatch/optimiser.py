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
            for p in group["params"]:
                if p.grad is not None:
                    update(p, p.grad, group)

    def _turn(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        mean: Tensor = state["momentum"].lerp_(grad, 1 - group["momentum"])
        matrix = grad.lerp(mean, group["momentum"]).flatten(1)
        turned = orthogonalise(matrix) * (0.2 * max(matrix.shape) ** 0.5)
        p.add_(turned.view(p.shape), alpha=-group["lr"])

    def _adam(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, (first, second) = self.state[p], group["betas"]
        if not state:
            state.update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
        state["step"] += 1
        mean = state["mean"].lerp_(grad, 1 - first) / (1 - first ** state["step"])
        square = state["square"].lerp_(grad.square(), 1 - second) / (1 - second ** state["step"])
        p.addcdiv_(mean, square.sqrt().add_(1e-8), value=-group["lr"])


def orthogonalise(matrix: Tensor) -> Tensor:
    """U V^T of a matrix U S V^T, approximately: singular values between about 0.7 and 1.2.

    Arguments:
        matrix: Shape ``[rows, columns]``.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalise(matrix.T).T
    (a, b, c), x = ITERATION, matrix / (matrix.norm() + 1e-7)
    for _ in range(STEPS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x
