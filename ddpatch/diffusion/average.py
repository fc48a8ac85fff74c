"""Exponential moving average of weights."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


class AveragedModel(Generic[Module]):
    """θ̄ ← β θ̄ + (1 - β) θ with β = 2^(-n / half-life) after a step on n samples.

    Early on the half-life is limited to a tenth of the samples seen, so that the random initial weights are forgotten.

    Arguments:
        module: The trained module.
        half_life: In samples.
    """

    def __init__(self, module: Module, half_life: float) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.half_life = half_life

    @torch.no_grad()
    def update(self, module: Module, samples: int, samples_seen: int) -> None:
        """Average in the weights after a step on ``samples`` samples, ``samples_seen`` of them in all."""
        beta = 0.5 ** (samples / min(self.half_life, max(samples_seen / 10, 1e-9)))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - beta)
