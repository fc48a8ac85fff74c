"""Fields in host memory: no more than a group of patches is on the device, and nothing is computed across the two."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import PATCHED
from problems import field_of, small_config
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ddpatch.data.gaussian import PowerLaw
from ddpatch.ledger import Ledger, aten
from ddpatch.parallel.collectives import Exchange
from ddpatch.parallel.comm import Communicator
from ddpatch.run import decompose, make_denoiser, make_model, stencil_reach

GRID, PATCH, PATCHES = (16, 24), (8, 8), 6


class Apart(Ledger):
    """The device ``meta``, which has shapes and no memory, apart from the host: tensors may be copied between the two only.

    Attributes:
        taken, brought: Shapes of what was copied to the device, and from it.
    """

    def __init__(self) -> None:
        super().__init__(len(GRID), PATCHES, set())
        self.taken: list[torch.Size] = []
        self.brought: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make one operation, or pretend to copy."""
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim]
        places = {x.device.type for x in tensors} | {str(d.type) for d in [(kwargs or {}).get("device")] if tensors and d}
        if len(places) == 1:
            return super().__torch_dispatch__(func, types, args, kwargs)
        if not tensors:
            return func(*args, **(kwargs or {}))
        assert func in (aten._to_copy.default, aten.copy_.default), f"{func} of tensors on {places}"
        source = args[func is aten.copy_.default]
        (self.brought if source.is_meta else self.taken).append(source.shape)
        if func is aten.copy_.default:
            return args[0]
        return torch.empty(source.shape, dtype=(kwargs or {}).get("dtype") or source.dtype, device=kwargs["device"])


@pytest.mark.parametrize("at_once", [None, 4])
@pytest.mark.parametrize("coupling", PATCHED)
def test_a_group_is_on_the_device_and_the_field_is_not(coupling: str, at_once: int | None) -> None:
    domain: dict[str, object] = {"grid": GRID, "patch": PATCH, "periodic": [True, True]}
    config = small_config(Path("none"), domain=domain, model={"coupling": coupling}, execution={"patches_at_once": at_once})
    field = field_of(PowerLaw().power(GRID), 2, stencil_reach(config), (4, 6))
    model = make_model(config, field).to("meta")
    x = torch.zeros(1, PATCHES, 2, *PATCH, dtype=torch.float64)
    denoise = make_denoiser(config, field, model, Exchange(decompose(config, 1), Communicator(), config.model.reach))
    with torch.no_grad(), Apart() as apart:
        found = denoise(x, torch.ones(1, dtype=torch.float64))
    windows, results = ([shape for shape in moved if len(shape) == x.ndim] for moved in (apart.taken, apart.brought))
    assert found.device == x.device and found.shape == x.shape
    assert sum(math.prod(shape) for shape in results) == x.numel()
    assert {shape[1] for shape in windows} == {shape[1] for shape in results} == ({4, 2} if at_once else {PATCHES})
