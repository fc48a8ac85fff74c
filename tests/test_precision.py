"""Features in bfloat16: near the network in full precision, with an exact linear part, and only where the processor has it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from problems import small_config, write_fields

from ddpatch import execution
from ddpatch.config import Config
from ddpatch.data.fields import FieldFile
from ddpatch.diffusion.denoiser import Denoiser
from ddpatch.errors import UserError
from ddpatch.execution import check_precision, computes_bfloat16, fit_groups
from ddpatch.model.layers import PointNorm, ResidualBlock
from ddpatch.parallel.collectives import Exchange
from ddpatch.parallel.comm import Communicator
from ddpatch.run import decompose, make_denoiser, make_model, measure_field, resolve

SIGMAS = (0.01, 0.3, 10.0)


def configured(data: Path, coupling: str = "two-level", **settings: object) -> Config:
    return small_config(data, "float32", model={"coupling": coupling}, execution=settings)


def perturbed_denoiser(config: Config, comm: Communicator) -> tuple[Denoiser, torch.nn.Module]:
    """With weights that are not those of the start, where the network adds nothing to the linear part."""
    with FieldFile(config.data.path) as file:
        config = resolve(config, file)
        field = measure_field(config, file, comm)
    model = make_model(config, field)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    exchange = Exchange(decompose(config, comm.size), comm, config.model.reach)
    return make_denoiser(config, field, model, exchange), model


def gradients(denoiser: Denoiser, model: torch.nn.Module, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    loss = denoiser.loss(x, torch.randn(x.shape, generator=torch.Generator().manual_seed(2)), sigma)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()), allow_unused=False)])


@pytest.mark.parametrize("coupling", ["two-level", "halo", "self-only"])
def test_bfloat16_is_near_full_precision(coupling: str, tmp_path: Path) -> None:
    comm, data = Communicator(), write_fields(tmp_path / "data.h5")
    full, model = perturbed_denoiser(configured(data, coupling), comm)
    lower, copy = perturbed_denoiser(configured(data, coupling, precision="bfloat16"), comm)
    with FieldFile(data) as file:
        config = resolve(configured(data, coupling), file)
    x = torch.randn(1, decompose(config, 1).num_patches, 2, *config.domain.patch, generator=torch.Generator().manual_seed(1))
    for level in SIGMAS:
        sigma = torch.tensor([level], dtype=torch.float64)
        expected, found = full(x, sigma), lower(x, sigma)
        network = (expected - x / (1 + level**2)).norm()  # what the network adds to c_skip x
        assert found.dtype == torch.float32
        assert 0 < (found - expected).norm() < 0.03 * network
        a, b = gradients(full, model, x, sigma), gradients(lower, copy, x, sigma)
        assert b.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.99


def test_groups_in_bfloat16_have_the_gradients_of_all_patches(tmp_path: Path) -> None:
    comm, data = Communicator(), write_fields(tmp_path / "data.h5")
    whole, model = perturbed_denoiser(configured(data, precision="bfloat16"), comm)
    parts, copy = perturbed_denoiser(configured(data, precision="bfloat16", patches_at_once=2), comm)
    with FieldFile(data) as file:
        config = resolve(configured(data), file)
    x = torch.randn(1, decompose(config, 1).num_patches, 2, *config.domain.patch, generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([0.3], dtype=torch.float64)
    a, b = gradients(whole, model, x, sigma), gradients(parts, copy, x, sigma)
    torch.testing.assert_close(a, b, rtol=0, atol=2e-2 * float(a.abs().max()))


def test_weights_follow_the_type_of_features() -> None:
    block, norm = ResidualBlock(3, 4, 8, 6), PointNorm(4)
    x, noise = torch.randn(2, 4, 6, 6, 6, dtype=torch.bfloat16), torch.randn(2, 6, dtype=torch.bfloat16)
    found = block(norm(x), noise)
    assert found.dtype == torch.bfloat16
    found.float().sum().backward()
    assert {p.grad.dtype for p in block.parameters() if p.grad is not None} == {torch.float32}


def test_untrained_networks_are_the_linear_part_in_any_precision(tmp_path: Path) -> None:
    comm, data = Communicator(), write_fields(tmp_path / "data.h5")
    with FieldFile(data) as file:
        config = resolve(configured(data, precision="bfloat16"), file)
        field = measure_field(config, file, comm)
    exchange = Exchange(decompose(config, 1), comm, config.model.reach)
    x = torch.randn(1, len(exchange.patches), 2, *config.domain.patch)
    sigma = torch.tensor([0.1], dtype=torch.float64)
    found = [make_denoiser(each, field, make_model(each, field), exchange)(x, sigma) for each in (config, full_of(config))]
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def full_of(config: Config) -> Config:
    with FieldFile(config.data.path) as file:
        return resolve(configured(Path(config.data.path)), file)


def test_a_processor_without_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = configured(tmp_path / "data.h5", precision="bfloat16")
    monkeypatch.setattr(execution, "computes_bfloat16", lambda device: False)
    with pytest.raises(UserError, match=r"execution\.precision: expected full, got bfloat16: .* cpu on .* is none"):
        check_precision(config, torch.device("cpu"))
    check_precision(configured(tmp_path / "data.h5"), torch.device("cpu"))


def test_what_a_processor_says_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, expected in (("flags : fpu avx512_bf16 vme", True), ("Features : fp bf16", True), ("flags : fpu avx512f", False)):
        monkeypatch.setattr(Path, "read_text", lambda self, text=flags: text)
        assert computes_bfloat16(torch.device("cpu")) is expected


def test_sampling_on_more_ranks_keeps_the_precision(tmp_path: Path) -> None:
    with FieldFile(write_fields(tmp_path / "data.h5")) as file:
        config = resolve(configured(tmp_path / "data.h5", precision="bfloat16", patches_at_once=99), file)
    fitted = fit_groups(config, decompose(config, 1)).execution
    assert fitted.precision == "bfloat16" and fitted.patches_at_once == decompose(config, 1).num_patches
