"""Losses and gradients of a small network on these ranks, for tests of what must not change them."""

from __future__ import annotations

from pathlib import Path

import torch
from problems import field_of, random_field, small_config
from torch import Tensor

from ddpatch.config import Config
from ddpatch.couplings import COUPLINGS
from ddpatch.data.gaussian import PowerLaw
from ddpatch.model.patches import cut
from ddpatch.parallel.collectives import Exchange
from ddpatch.parallel.comm import Communicator
from ddpatch.parallel.gradients import GradientSum
from ddpatch.run import decompose, make_denoiser, make_model, stencil_reach

GRIDS = [
    ((16, 24), (8, 8), (True, True)),
    ((40, 8), (8, 8), (False, True)),
    ((16, 8, 12), (4, 4, 12), (True, True, False)),
    ((8, 8, 8), (4, 4, 4), (True, True, True)),
]
PATCHED = [name for name, paths in COUPLINGS.items() if not paths.whole]


def configured(
    at_once: int | None, coupling: str, grid: tuple[int, ...], patch: tuple[int, ...], periodic: tuple[bool, ...]
) -> Config:
    return small_config(
        Path("none"),
        domain={"grid": grid, "patch": patch, "periodic": periodic},
        model={"coupling": coupling},
        execution={"patches_at_once": at_once},
    )


def gradients(config: Config, comm: Communicator) -> tuple[Tensor, list[Tensor]]:
    """The loss of the own patches, and the gradients of the field and of all parameters."""
    decomposition = decompose(config, comm.size)
    exchange = Exchange(decomposition, comm, config.model.reach)
    grid, patch = decomposition.grid_shape, decomposition.patch_shape
    waves = tuple(config.model.tokens * n // p // 2 for n, p in zip(grid, patch, strict=True))
    field = field_of(PowerLaw().power(grid), 2, stencil_reach(config), waves)
    model = make_model(config, field)
    for i, parameter in enumerate(model.parameters()):  # from 0.3 on outputs are so large that sums which cancel lose 1e-10
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(i))
    sums = GradientSum(model.parameters(), comm)
    clean, noise = (cut(random_field(2, 2, grid, seed), decomposition, exchange.patches) for seed in (0, 1))
    sigma = torch.tensor([0.1, 3.0], dtype=torch.float64)
    loss = make_denoiser(config, field, model, exchange).loss(clean.requires_grad_(), noise, sigma)
    loss.backward()
    sums.finish()
    assert clean.grad is not None
    return loss.detach(), [clean.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        scale = float(b.abs().max())  # of the tensor: an element may be a small difference of large sums
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * scale)
    assert max(float(b.abs().max()) for b in expected) > 0
