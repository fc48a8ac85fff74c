"""What an action allocates and computes, operation by operation."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
STATE, GRADIENTS, FIELDS, COARSE, FEATURES = "other state", "gradients", "fields", "coarse level", "features"
Peaks = dict[tuple[Any, ...], Counter[str]]


@dataclass
class Entry:
    """Memory that is in use: to which part it belongs, and its bytes."""

    part: str
    size: int


class Ledger(TorchDispatchMode):
    """Writes down what is allocated and computed while it is entered.

    Arguments:
        axes: Of the grid.
        patches: Of the rank.
        parameters: Shapes of the parameters.

    Attributes:
        peaks: Bytes by part when most are allocated, for every kind of operation: its name, the number of dims of what it
            makes, whether that is an array of all patches of the rank, and whether the coarse level runs.
        flops: Floating point operations of convolutions and matrix products.
        attention: Of these, those between tokens and keys.
    """

    def __init__(self, axes: int, patches: int, parameters: set[torch.Size]) -> None:
        super().__init__()
        self.axes, self.patches, self.parameters, self.coarse = axes, patches, parameters, False
        self.live: Counter[str] = Counter()
        self.total = self.flops = self.attention = 0
        self.peaks: Peaks = {}
        self._known: weakref.WeakKeyDictionary[Any, Entry] = weakref.WeakKeyDictionary()

    def begin(self, kept: Mapping[str, Sequence[Tensor]]) -> None:
        """Start a new page, with the parts of what is kept; whatever else lives by now is other state."""
        for entry in self._known.values():
            entry.part = STATE
        for part, tensors in kept.items():
            for storage in (tensor.untyped_storage() for tensor in tensors):
                self._enter(storage).part = part
        self.live = Counter()
        for entry in self._known.values():
            self.live[entry.part] += entry.size
        self.total, self.flops, self.attention, self.peaks = self.live.total(), 0, 0, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make one operation. Where a number decides what comes next, it is 1; noise levels are all different."""
        if func is aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        if func is aten._unique2.default:
            numbers = torch.empty_like(args[0], dtype=torch.int64)
            return torch.empty_like(args[0]), numbers, numbers[:0]
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in FLOPS:
            operations = FLOPS[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
            self.flops += operations
            self.attention += operations * (func._overloadpacket in ATTENTION)
        made = [item for item in tree_leaves(result) if isinstance(item, Tensor)]
        for tensor in made:
            self._add(tensor)
        for tensor in made[:1]:
            own = tensor.ndim == self.axes + 3 and tensor.shape[1] == self.patches
            self._compare((func, tensor.ndim, own, self.coarse))
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._known:
            entry = self._enter(storage)
            entry.part = self._part(tensor)
            self.live[entry.part] += entry.size
            self.total += entry.size

    def _enter(self, storage: Any) -> Entry:
        if storage not in self._known:
            entry = self._known[storage] = Entry(STATE, storage.nbytes())
            weakref.finalize(storage, self._free, entry)
        return self._known[storage]

    def _free(self, entry: Entry) -> None:
        self.live[entry.part] -= entry.size
        self.total -= entry.size

    def _compare(self, name: tuple[Any, ...]) -> None:
        if name not in self.peaks or self.total > self.peaks[name].total():
            self.peaks[name] = self.live.copy()

    def _part(self, tensor: Tensor) -> str:
        """Arrays ``[sample, patch, channel, *points]`` are fields; a vector as long as a bucket is on its way."""
        if tensor.ndim == self.axes + 3:
            return FIELDS
        if tensor.shape in self.parameters or tensor.ndim == 1:
            return GRADIENTS
        return COARSE if self.coarse else FEATURES


class Meta(DeviceContext):
    """New tensors have shapes and no memory; attention is that of devices, which never hold a matrix of all pairs.

    A kind of ``torch.device`` as a context, since checkpoints enter that again where they call a function again.
    """

    def __init__(self) -> None:
        super().__init__("meta")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, or what stands for it."""
        if func is F.scaled_dot_product_attention:
            return aten._scaled_dot_product_flash_attention_for_cpu(*args, **(kwargs or {}))[0]
        return super().__torch_function__(func, types, args, kwargs)


ATTENTION: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_val=None, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, out_val=None, **__: (
        sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)
    ),
}
FLOPS: dict[Any, Callable[..., int]] = {**flop_registry, **ATTENTION}
