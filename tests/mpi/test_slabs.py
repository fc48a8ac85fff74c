"""The network in slabs, which ddpatch is compared with, is one network on the whole volume: a fair opponent."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from ddpatch.parallel.comm import Communicator

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from slabs import SlabUNet

pytestmark = pytest.mark.mpi(min_size=1)
GRID, WIDTHS = (24, 4, 4), (8, 16)  # 1 to 4 slabs, which merge two by two


def outcome(comm: Communicator, whole: bool) -> list[torch.Tensor]:
    """The sum of a weighted output and its gradients: of all slabs, or of one rank on its own."""
    group = comm.split(comm.rank) if whole else comm
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = SlabUNet(3, WIDTHS, group).double()
    x, weights = torch.randn(2, 1, 3, *GRID, generator=generator, dtype=torch.float64)
    size = GRID[0] // group.size
    own = slice(group.rank * size, (group.rank + 1) * size)
    loss = (network(x[:, :, own], torch.zeros(1, dtype=torch.float64)) * weights[:, :, own]).sum()
    loss.backward()
    found = [loss.detach()[None], *(p.grad for p in network.parameters() if p.grad is not None)]
    totals = [group.allreduce_(tensor.clone()) for tensor in found]
    if whole:
        group.free()
    return totals


def test_slabs_have_the_output_and_the_gradients_of_the_whole(comm: Communicator) -> None:
    for found, expected in zip(outcome(comm, whole=False), outcome(comm, whole=True), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
