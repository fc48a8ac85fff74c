"""The distributed FFT against torch's, on grids that no number of ranks divides."""

from __future__ import annotations

import pytest
import torch

from ddpatch.parallel.comm import Communicator
from ddpatch.parallel.fft import SlabFFT

pytestmark = pytest.mark.mpi
GRIDS = pytest.mark.parametrize("grid", [(7, 6, 5), (2, 3, 8), (3, 2, 4), (9, 4), (2, 7), (3, 2)], ids=str)


def field(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(dtype)


@GRIDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_forward_is_the_transform_of_the_whole_field(comm: Communicator, grid: tuple[int, ...], dtype: torch.dtype) -> None:
    fft, x = SlabFFT(grid, comm), field(2, 3, *grid, dtype=dtype)
    ndim = len(grid)
    whole = torch.fft.rfftn(x, dim=tuple(range(-ndim, 0)), norm="forward")
    modes = fft.forward(x.narrow(-ndim, fft.slab.start, len(fft.slab)))
    torch.testing.assert_close(modes, whole.narrow(1 - ndim, fft.columns.start, len(fft.columns)))


@GRIDS
def test_rows_and_columns_are_dealt_out_once(comm: Communicator, grid: tuple[int, ...]) -> None:
    fft = SlabFFT(grid, comm)
    owned = comm.gather((list(fft.slab), list(fft.columns)))
    for axis in (0, 1):
        assert [row for rows in owned for row in rows[axis]] == list(range(fft.mode_shape[axis]))


@GRIDS
def test_wavenumbers_and_weights_differentiate_and_sum_the_spectrum(comm: Communicator, grid: tuple[int, ...]) -> None:
    fft, x = SlabFFT(grid, comm), field(*grid)
    modes = fft.forward(x[fft.slab.start : fft.slab.stop])
    power = comm.allreduce_((fft.weights() * modes.abs() ** 2).sum())
    torch.testing.assert_close(power, x.square().mean())
    full = torch.fft.fftn(x, norm="forward").abs() ** 2
    for axis, k in enumerate(fft.wavenumbers()):
        part = comm.allreduce_((fft.weights() * k**2 * modes.abs() ** 2).sum())
        numbers = torch.fft.fftfreq(grid[axis], 1 / grid[axis], dtype=torch.float64)
        expected = (full * numbers.reshape([-1 if i == axis else 1 for i in range(len(grid))]) ** 2).sum()
        torch.testing.assert_close(part, expected)
