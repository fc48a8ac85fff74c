"""Samples written as a file per rank, joined by a virtual dataset."""

from __future__ import annotations

from contextlib import suppress

import h5py
import numpy as np
from torch import Tensor

from ddpatch.errors import UserError
from ddpatch.io.volume import create_dataset, create_fields, publish, sync
from ddpatch.io.writer import NAME, VolumeWriter, let_go, rank_name, ranks_folder, remove_folder


class VirtualWriter(VolumeWriter):
    """Every rank writes a file of its own, and rank 0 a virtual dataset that joins them: no rank waits for another.

    The ranks' files lie in the folder ``<file>.ranks`` beside the joint file, which names them relative to itself: the two move
    together.
    """

    mode, any_ranks = "virtual", False

    def _remains(self) -> bool:
        return self._folder.is_dir()

    def _start(self) -> None:
        self._own_path = self._folder / rank_name(self.comm.rank)
        self.comm.on_root(self._prepare)
        if self.finished:
            self._file = h5py.File(self._own_path, "r+")
            self._dataset = self._file[NAME]
            return
        self._file = h5py.File(self._own_path, "w")
        self._dataset = create_dataset(self._file, NAME, self._rank_shape(self.comm.rank), self.header.dtype)
        self._dataset.attrs["patches"] = np.asarray(self._local)
        self._file.flush()

    def _prepare(self) -> None:
        final = ranks_folder(self.path)
        if final.exists() and not self.overwrite:
            raise UserError(f"{final}: exists already, and is only replaced with overwrite")
        if not self.finished:
            self._folder.mkdir()

    def _rank_shape(self, rank: int) -> tuple[int, ...]:
        count = self.decomposition.counts[rank]
        return self.header.samples, count, len(self.header.channels), *self.decomposition.patch_shape

    def _write(self, sample: int, patches: Tensor) -> None:
        self._dataset[sample] = patches.numpy()

    def _flush(self) -> None:
        self._file.flush()
        sync(self._own_path)

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

    def _close(self) -> None:
        if self._file is not None:
            let_go(self._file)

    def _remove(self) -> None:
        self._own_path.unlink(missing_ok=True)
        if self.comm.rank == 0:
            self._temporary.unlink(missing_ok=True)
        with suppress(OSError):  # the last rank to leave finds the folder empty
            self._folder.rmdir()
