"""Samples written as a file per rank, joined by a virtual dataset."""

from __future__ import annotations

from contextlib import suppress

import h5py
import numpy as np
from torch import Tensor

from ddpatch.errors import UserError
from ddpatch.io.volume import create_fields, publish, sync, temporary_path
from ddpatch.io.writer import NAME, VolumeWriter, rank_name, ranks_folder, remove_folder


class VirtualWriter(VolumeWriter):
    """Every rank writes a file of its own, and rank 0 a virtual dataset that joins them: no rank waits for another.

    The ranks' files lie in the folder ``<file>.ranks`` beside the joint file, which names them relative to itself: the two move
    together.
    """

    def _start(self) -> None:
        self._folder = temporary_path(ranks_folder(self.path))
        self._own_path = self._folder / rank_name(self.comm.rank)
        self.comm.on_root(self._make_folder)
        self._file = h5py.File(self._own_path, "w")
        dataset = self._file.create_dataset(NAME, self._rank_shape(self.comm.rank), self.header.dtype)
        dataset.attrs["patches"] = np.asarray(self._local)
        self.comm.barrier()  # a rank that fails from here on must not find the folder empty and remove it

    def _make_folder(self) -> None:
        final = ranks_folder(self.path)
        if final.exists() and not self.overwrite:
            raise UserError(f"{final}: exists already, and is only replaced with overwrite")
        remove_folder(self._folder)
        self._folder.mkdir()

    def _rank_shape(self, rank: int) -> tuple[int, ...]:
        count = self.decomposition.counts[rank]
        return self.header.samples, count, len(self.header.channels), *self.decomposition.patch_shape

    def _write(self, sample: int, patches: Tensor) -> None:
        self._file[NAME][sample] = patches.numpy()

    def _finish(self) -> None:
        self._file.close()
        sync(self._own_path)
        self.comm.barrier()
        self.comm.on_root(self._join)

    def _join(self) -> None:
        with h5py.File(self._temporary, "w") as joint:
            create_fields(joint, self.header, NAME, self._layout())
        final = ranks_folder(self.path)
        if self.overwrite:
            self.path.unlink(missing_ok=True)  # an old joint file must not find new numbers behind its names
            remove_folder(final)
        sync(self._folder)
        self._folder.rename(final)
        publish(self._temporary, self.path)

    def _layout(self) -> h5py.VirtualLayout:
        layout = h5py.VirtualLayout(self.header.shape, self.header.dtype)
        for rank in range(self.comm.size):
            source = h5py.VirtualSource(f"{ranks_folder(self.path).name}/{rank_name(rank)}", NAME, self._rank_shape(rank))
            for place, patch in enumerate(self.decomposition.local_patches(rank)):
                box = (slice(None), slice(None), *self.decomposition.slices(patch))
                layout[box] = source[:, place]
        return layout

    def _abandon(self) -> None:
        if self._file is not None:
            self._file.close()
        self._own_path.unlink(missing_ok=True)
        if self.comm.rank == 0:
            self._temporary.unlink(missing_ok=True)
        with suppress(OSError):  # the last rank to leave finds the folder empty
            self._folder.rmdir()
