"""The Fourier transform of a real field that no rank holds whole: slabs of axis 0 go in, slabs of axis 1 come out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpatch.decomposition import block_range
from ddpatch.parallel.comm import Communicator


class SlabFFT:
    """Real-to-complex FFT of fields whose rows of axis 0 are spread over the ranks.

    The transform of all axes but the first is local; one all-to-all transposition then makes axis 0 complete. A rank may own
    no rows at all.

    Arguments:
        grid_shape: Points of the global grid, ``([nz,] ny, nx)``.
        comm: The ranks that share the grid.

    Attributes:
        slab: The rows of axis 0 that this rank owns before the transform.
        columns: The rows of axis 1 that it owns after it. In 2-D axis 1 is the halved one, so these are columns of
            ``nx // 2 + 1``.
    """

    def __init__(self, grid_shape: Sequence[int], comm: Communicator) -> None:
        self.grid_shape, self.comm = tuple(grid_shape), comm
        self.mode_shape = (*self.grid_shape[:-1], self.grid_shape[-1] // 2 + 1)
        self._slabs = [block_range(self.mode_shape[0], comm.size, rank) for rank in range(comm.size)]
        self._columns = [block_range(self.mode_shape[1], comm.size, rank) for rank in range(comm.size)]
        self.slab, self.columns = self._slabs[comm.rank], self._columns[comm.rank]

    def forward(self, x: Tensor) -> Tensor:
        """The Fourier coefficients û = fftn(u) / N of this rank's columns. Collective.

        Arguments:
            x: Real field on this rank's rows, with shape ``[..., slab, (ny,) nx]``.

        Returns:
            The half spectrum, with shape ``[..., nz, columns, nx // 2 + 1]`` (2-D: ``[..., ny, columns]``).
        """
        ndim = len(self.grid_shape)
        inner = self._inner(x)
        pieces = [inner.narrow(1 - ndim, c.start, len(c)).contiguous() for c in self._columns]
        rest = (len(self.columns), *self.mode_shape[2:])
        received = self.comm.alltoall(pieces, [(*x.shape[:-ndim], len(s), *rest) for s in self._slabs])
        modes = torch.cat(received, dim=-ndim)
        if modes.numel():
            modes = torch.fft.fft(modes, dim=-ndim, norm="forward")
        return modes

    def _inner(self, x: Tensor) -> Tensor:
        dims = tuple(range(1 - len(self.grid_shape), 0))
        if x.numel():
            return torch.fft.rfftn(x, dim=dims, norm="forward")
        return x.new_empty((*x.shape[: dims[0]], *self.mode_shape[1:]), dtype=torch.complex(x, x).dtype)

    def wavenumbers(self) -> list[Tensor]:
        """The integer wave number of :meth:`forward`'s modes along each axis, in float64, broadcastable to its last axes."""
        ndim = len(self.grid_shape)
        numbers = [torch.fft.fftfreq(n, 1 / n, dtype=torch.float64) for n in self.grid_shape[:-1]]
        numbers.append(torch.arange(self.mode_shape[-1], dtype=torch.float64))
        numbers[1] = numbers[1][self.columns.start : self.columns.stop]
        return [k.reshape([-1 if i == axis else 1 for i in range(ndim)]) for axis, k in enumerate(numbers)]

    def weights(self) -> Tensor:
        """How many modes of the full spectrum each mode of the half spectrum stands for: 1 or 2, broadcastable like
        :meth:`wavenumbers`."""
        number = self.wavenumbers()[-1]
        alone = (number == 0) | (2 * number == self.grid_shape[-1])
        return torch.where(alone, 1.0, 2.0).to(torch.float64)
