"""Convolutions, in the type of the features that they meet, by the fast path of the library wherever there is one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDE = 5  # points per axis of a kernel in three dimensions that pays in Fourier space (docs/decisions/0015)
SLOW_BELOW = 20480  # channels times points of two axes: torch (ConvParams::use_mkldnn) takes less, of one patch, the slow way


class Conv2d(nn.Conv2d):
    """A convolution in the type of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, inputs, *points]`` to ``[batch, outputs, *points]``."""
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        return map_points(x, weight, bias) if weight[0, 0].numel() == 1 else self._conv_forward(x, weight, bias)


class Conv3d(nn.Conv3d):
    """A convolution in the type of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, inputs, *points]`` to ``[batch, outputs, *points]``."""
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        if weight[0, 0].numel() == 1:
            return map_points(x, weight, bias)
        if not pays_in_halves(x, weight):
            return self._conv_forward(x, weight, bias)
        assert not isinstance(self.padding, str)
        sides = [width for width in reversed(self.padding) for _ in range(2)]
        padded = F.pad(x, sides, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
        return convolve(padded, weight, bias)


CONV: dict[int, type[Conv2d] | type[Conv3d]] = {2: Conv2d, 3: Conv3d}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def map_points(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A convolution whose kernel is one point, as the matrix product that it is where channels are last in memory.

    Arguments:
        x: Shape ``[batch, inputs, *points]``.
        weight: Shape ``[outputs, inputs, 1, (1,) 1]``.
        bias: Shape ``[outputs]``.

    Returns:
        Shape ``[batch, outputs, *points]``, channels last.
    """
    return F.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The unpadded convolution y(i) = Σ_o w(o) x(i + o) + b.

    Arguments:
        x: Shape ``[batch, inputs, *points]``, with two or three axes of points.
        weight: Shape ``[outputs, inputs, *kernel]``.
        bias: Shape ``[outputs]``.

    Returns:
        Shape ``[batch, outputs, *(points - kernel + 1)]``.
    """
    if x.ndim == 4:
        return F.conv2d(x, weight, bias)
    if not pays_in_halves(x, weight):
        return F.conv3d(x, weight, bias)
    half, reach = (x.shape[2] - weight.shape[2] + 1) // 2, weight.shape[2] - 1
    halves = torch.cat([x[:, :, : half + reach], x[:, :, half:]])
    return torch.cat(F.conv3d(halves, weight, bias).chunk(2), dim=2)


def convolve_few(x: Tensor, weight: Tensor) -> Tensor:
    """:func:`convolve` where there are few channels, and wide kernels cost more than Fourier transforms,

        ŷ(k) = conj(ŵ(k)) x̂(k),

    which is cyclic: what comes round to the other side is at points that are left out. The results are the same within rounding.
    """
    if x.ndim == 4 or weight.shape[2] < WIDE:
        return convolve(x, weight)
    points, dims = x.shape[2:], (-3, -2, -1)
    waves, transfer = torch.fft.rfftn(x, dim=dims), torch.fft.rfftn(weight, s=points, dim=dims).conj()
    sums = [sum(factor * wave for factor, wave in zip(row, waves.unbind(1), strict=True)) for row in transfer]
    found = torch.fft.irfftn(torch.stack(sums, dim=1), s=points, dim=dims)
    for axis, (n, width) in enumerate(zip(points, weight.shape[2:], strict=True), start=2):
        found = found.narrow(axis, 0, n - width + 1)
    return found


def pays_in_halves(x: Tensor, weight: Tensor) -> bool:
    """Whether one patch is to be convolved as a batch of two halves that overlap.

    For a batch of one small patch torch unfolds the patch into a matrix, which takes up to four times as long as what it does
    for a batch (docs/decisions/0015). The results are the same within rounding.
    """
    small = len(x) == 1 and x.dtype == torch.float32 and x.device.type == "cpu" and x.shape[1:4].numel() <= SLOW_BELOW
    return small and weight.shape[2] % 2 == 1 < weight.shape[2] and x.shape[2] % 2 == 0
