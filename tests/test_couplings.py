"""Every coupling reaches what it says, through the same code that trains and samples."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from problems import random_field, small_config, write_fields

from ddpatch.config import Config
from ddpatch.couplings import COUPLINGS
from ddpatch.data.fields import FieldFile
from ddpatch.errors import UserError
from ddpatch.model.patches import cut, within
from ddpatch.model.two_level import count_parameters
from ddpatch.parallel.collectives import Exchange
from ddpatch.parallel.comm import Communicator
from ddpatch.run import Field, decompose, make_denoiser, make_model, measure_field, resolve
from ddpatch.sample import Sampler
from ddpatch.train import train

EVERYWHERE = set(range(9))
REACH = {  # patches of a row of 9 that patch 0 is told of; with 4 tokens per patch, 6 tokens are one and a half patches
    "two-level": EVERYWHERE,
    "tokens": EVERYWHERE,
    "additive": EVERYWHERE,
    "convolutional": {0, 1, 2, 7, 8},
    "halo": {0, 1, 8},
    "none": {0},
    "self-only": {0},
}


def resolved(path: Path, coupling: str) -> tuple[Config, Field]:
    with FieldFile(path) as file:
        config = resolve(small_config(path, model={"coupling": coupling}), file)
        return config, measure_field(config, file, Communicator())


def parameters(path: Path, coupling: str) -> int:
    return count_parameters(make_model(*resolved(path, coupling)))


@pytest.mark.parametrize(("coupling", "reach"), REACH.items())
def test_a_patch_is_told_of(coupling: str, reach: set[int], tmp_path: Path) -> None:
    config, field = resolved(write_fields(tmp_path / "data.h5", grid=(72, 8)), coupling)
    model, decomposition = make_model(config, field), decompose(config, 1)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    denoise = make_denoiser(config, field, model, Exchange(decomposition, Communicator(), config.model.reach))
    x, heard = random_field(1, 2, (72, 8)), set()
    with torch.no_grad():
        before = denoise(cut(x, decomposition), torch.ones(1))[:, 0]
        for patch in range(9):
            other = x.clone()
            other[within(decomposition, patch)] += 1
            if not torch.equal(denoise(cut(other, decomposition), torch.ones(1))[:, 0], before):
                heard.add(patch)
    assert heard == reach


def test_every_coupling_is_tried_here() -> None:
    assert set(REACH) | {"full-domain", "u-net"} == set(COUPLINGS)


def test_the_control_has_the_same_network(tmp_path: Path) -> None:
    """Up to the channel that marks the inside, of the stem (8 weights) and of the tokens (16)."""
    path = write_fields(tmp_path / "data.h5", grid=(24, 24))
    assert parameters(path, "self-only") == parameters(path, "two-level") + 8 + 16
    assert parameters(path, "full-domain") == parameters(path, "two-level")


@pytest.mark.parametrize("coupling", ["full-domain", "u-net"])
def test_the_full_domain_is_one_patch_without_an_edge(coupling: str, tmp_path: Path) -> None:
    path = write_fields(tmp_path / "data.h5", grid=(24, 24))
    config, field = resolved(path, coupling)
    assert config.domain.patch == (24, 24)
    assert config.model.tokens == 12
    model, decomposition = make_model(config, field), decompose(config, 1)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    denoise = make_denoiser(config, field, model, Exchange(decomposition, Communicator(), config.model.reach))
    x = random_field(1, 2, (24, 24))[:, None]
    with torch.no_grad():
        shifted = denoise(x.roll((2, -4), (3, 4)), torch.ones(1))
        torch.testing.assert_close(shifted, denoise(x, torch.ones(1)).roll((2, -4), (3, 4)))


def test_the_full_domain_has_the_keys_of_all_patches(tmp_path: Path) -> None:
    path = write_fields(tmp_path / "data.h5", grid=(24, 24))
    config = small_config(path, model={"coupling": "full-domain", "coarse_keys": 2})
    with FieldFile(path) as file:
        found = resolve(config, file)
        assert (found.model.tokens, found.model.coarse_keys) == (12, 6)
        assert resolve(found, file) == found


def test_a_full_domain_has_one_grid(tmp_path: Path) -> None:
    path = write_fields(tmp_path / "data.h5", grid=(16, 16))
    config = small_config(path, model={"coupling": "full-domain"}, train={"steps": 1})
    train(config, tmp_path / "run", Communicator())
    with pytest.raises(UserError, match=r"--grid 32 32: a full-domain model has the grid \[16, 16\]"):
        Sampler(tmp_path / "run", Communicator(), (32, 32))
    with FieldFile(write_fields(tmp_path / "long.h5", grid=(16, 24))) as file, pytest.raises(UserError, match="as many patches"):
        resolve(config, file)


def test_patches_alone_have_no_place(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.positions: expected 0 where patches have no place, got 2"):
        small_config(tmp_path, model={"coupling": "self-only", "positions": 2})


def test_the_switch_belongs_to_the_run(tmp_path: Path) -> None:
    path = write_fields(tmp_path / "data.h5")
    config = small_config(path, train={"steps": 1})
    train(config, tmp_path / "run", Communicator())
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, coupling="halo"))
    with pytest.raises(UserError, match=r"model\.coupling = two-level, the configuration has halo"):
        train(other, tmp_path / "run", Communicator())
