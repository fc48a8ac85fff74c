"""Convolutions of one small patch in halves, and wide ones in Fourier space: the same."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import profile

from ddpatch.model.convolution import Conv3d, convolve, convolve_few, pays_in_halves


def gradients(y: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return [y, *torch.autograd.grad(y.square().sum(), inputs)]


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("points", [(8, 6, 4), (7, 6, 5), (2, 2, 2)])
def test_halves_are_the_whole(mode: Literal["zeros", "circular"], points: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer, x = Conv3d(4, 6, 3, padding=1, padding_mode=mode), torch.randn(1, 4, *points, requires_grad=True)
    assert pays_in_halves(x, layer.weight) == (points[0] % 2 == 0)
    both = torch.cat([x, x])  # a batch goes the usual way
    expected = layer(both)[:1]
    for one, other in zip(gradients(layer(x), x, *layer.parameters()), gradients(expected, x, *layer.parameters()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_unpadded_halves_are_the_whole() -> None:
    x, weight, bias = torch.randn(1, 3, 10, 5, 5), torch.randn(2, 3, 3, 3, 3), torch.randn(2)
    torch.testing.assert_close(convolve(x, weight, bias), F.conv3d(x, weight, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("widths", [(5, 5, 5), (7, 3, 9), (3, 3, 3)])
def test_wide_kernels_in_fourier_space_are_the_same(widths: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, 12, 11, 9, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, *widths, dtype=torch.float64, requires_grad=True)
    expected = gradients(F.conv3d(x, weight), x, weight)
    for one, other in zip(gradients(convolve_few(x, weight), x, weight), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-11)


def test_one_small_patch_goes_the_fast_way() -> None:
    """The rule of torch that makes halves pay: should it change, :func:`pays_in_halves` may go."""

    def operations(x: torch.Tensor) -> set[str]:
        with torch.no_grad(), profile() as record:
            layer(x)
        return {entry.key for entry in record.key_averages()}

    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    layer, x = Conv3d(8, 8, 3, padding=1), torch.randn(1, 8, 8, 8, 8)
    assert "aten::slow_conv3d_forward" not in operations(x)
    assert "aten::slow_conv3d_forward" in operations(x[:, :, :7])  # seven planes have no halves
