"""A device apart from the host: what is copied between the two, and when the host waits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ddpatch.ledger import Ledger, aten

COPIES = (aten._to_copy.default, aten.copy_.default)


class Apart(Ledger):
    """The device ``meta``, which has shapes and no memory, apart from the host: tensors may be copied between the two only.

    Arguments:
        axes, patches: As of :class:`~ddpatch.ledger.Ledger`.

    Attributes:
        taken, brought: Shapes of what was copied to the device, and from it.
        waits: For what a host would wait for a device in this place.
    """

    def __init__(self, axes: int, patches: int) -> None:
        super().__init__(axes, patches, set())
        self.taken: list[torch.Size] = []
        self.brought: list[torch.Size] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make one operation, or pretend to copy."""
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            self.waits.append("a number")
            return super().__torch_dispatch__(func, types, args, kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        large = [x for x in tensors if x.ndim]
        places = {x.device.type for x in large} | {str(d.type) for d in [kwargs.get("device")] if large and d}
        if len(places) == 2:
            return self._copy(func, args, kwargs, places)
        if any(x.is_meta for x in tensors):
            return super().__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **kwargs)

    def _copy(self, func: Any, args: Any, kwargs: Any, places: set[str]) -> Any:
        assert func in COPIES, f"{func} of tensors on {places}"
        source = args[func is aten.copy_.default]
        (self.brought if source.is_meta else self.taken).append(source.shape)
        if not kwargs.get("non_blocking") and args[2:3] != (True,):
            self.waits.append(f"a copy of {list(source.shape)}")
        if func is aten.copy_.default:
            return args[0]
        return torch.empty(source.shape, dtype=kwargs.get("dtype") or source.dtype, device=kwargs["device"])


class Numbers(TorchFunctionMode):
    """Numbers of Python that become tensors of the device: as an index, or as they are. They are copied, which is waited for.

    Arguments:
        waits: Where that is written down.
    """

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function."""
        kwargs = kwargs or {}
        if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].is_meta:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.waits += [f"an index of {len(i)} numbers" for i in index if isinstance(i, list)]
        if func in (torch.tensor, torch.as_tensor) and "meta" in str(kwargs.get("device")):
            self.waits.append("a tensor of numbers")
        return func(*args, **kwargs)
