"""Fields in host memory: no more than a group of patches is on the device, and nothing is computed across the two."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from apart import Apart
from networks import PATCHED
from problems import field_of, small_config

from ddpatch.data.gaussian import PowerLaw
from ddpatch.parallel.collectives import Exchange
from ddpatch.parallel.comm import Communicator
from ddpatch.run import decompose, make_denoiser, make_model, stencil_reach

GRID, PATCH, PATCHES = (16, 24), (8, 8), 6


@pytest.mark.parametrize("at_once", [None, 4])
@pytest.mark.parametrize("coupling", PATCHED)
def test_a_group_is_on_the_device_and_the_field_is_not(coupling: str, at_once: int | None) -> None:
    domain: dict[str, object] = {"grid": GRID, "patch": PATCH, "periodic": [True, True]}
    config = small_config(Path("none"), domain=domain, model={"coupling": coupling}, execution={"patches_at_once": at_once})
    field = field_of(PowerLaw().power(GRID), 2, stencil_reach(config), (4, 6))
    model = make_model(config, field).to("meta")
    x = torch.zeros(1, PATCHES, 2, *PATCH, dtype=torch.float64)
    denoise = make_denoiser(config, field, model, Exchange(decompose(config, 1), Communicator(), config.model.reach))
    with torch.no_grad(), Apart(len(GRID), PATCHES) as apart:
        found = denoise(x, torch.ones(1, dtype=torch.float64))
    windows, results = ([shape for shape in moved if len(shape) == x.ndim] for moved in (apart.taken, apart.brought))
    assert found.device == x.device and found.shape == x.shape
    assert sum(math.prod(shape) for shape in results) == x.numel()
    assert {shape[1] for shape in windows} == {shape[1] for shape in results} == ({4, 2} if at_once else {PATCHES})
