"""Muon: orthogonal steps for matrices, Adam's for the rest, and a state that continues."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ddpatch.optimiser import ITERATION, STEPS, Muon, orthogonalise


@pytest.mark.parametrize("shape", [(8, 8), (5, 40), (40, 5)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    graded = u @ torch.diag(torch.logspace(0, -2, len(s))) @ v
    turned = orthogonalise(graded)
    values = torch.linalg.svdvals(turned)
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3
    torch.testing.assert_close(u.T @ turned @ v.T, torch.diag((u.T @ turned @ v.T).diagonal()), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(8, 8), (5, 40), (40, 5)])
def test_it_is_the_iteration_on_the_matrix_itself(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    (a, b, c), x = ITERATION, matrix / (matrix.norm() + 1e-7)
    for _ in range(STEPS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    torch.testing.assert_close(orthogonalise(matrix), x, rtol=0, atol=1e-10)


def test_a_matrix_of_zeros_stays() -> None:
    assert not orthogonalise(torch.zeros(3, 4)).any()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.SiLU(), nn.Flatten(), nn.Linear(6 * 9, 3))


def step(model: nn.Module, optimiser: torch.optim.Optimizer) -> float:
    x = torch.linspace(-1, 1, 4 * 2 * 25).view(4, 2, 5, 5)
    loss = (model(x) - x.flatten(1)[:, :3]).square().mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return float(loss.detach())


def test_vectors_and_named_matrices_move_as_with_adam() -> None:
    one, other = network(), network()
    muon, adam = Muon(one.named_parameters(), 1e-2, adam=("3.",)), torch.optim.Adam(other.parameters(), 1e-2, betas=(0.9, 0.99))
    step(one, muon), step(other, adam)
    for name in ("0.bias", "3.weight", "3.bias"):
        torch.testing.assert_close(one.get_parameter(name), other.get_parameter(name))
    assert not torch.allclose(one.get_parameter("0.weight"), other.get_parameter("0.weight"))


def test_it_minimises_and_continues_from_its_state() -> None:
    model = network()
    optimiser = Muon(model.named_parameters(), 1e-2)
    losses = [step(model, optimiser) for _ in range(60)]
    assert losses[-1] < 0.2 * losses[0]
    again = network()
    again.load_state_dict(model.state_dict())
    resumed = Muon(again.named_parameters(), 1e-2)
    resumed.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    assert [step(model, optimiser) for _ in range(3)] == [step(again, resumed) for _ in range(3)]
