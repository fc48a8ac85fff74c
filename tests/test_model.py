from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from problems import CASES, random_field, smooth_fields
from torch import Tensor, nn

from ddpatch.config import ModelConfig
from ddpatch.decomposition import Decomposition
from ddpatch.errors import UserError
from ddpatch.model.coarse import Audience, GeometricAttention, token_places
from ddpatch.model.convolution import CONV
from ddpatch.model.interpolation import doubled, map_rows, merge
from ddpatch.model.layers import Gain, PointNorm, ResidualBlock
from ddpatch.model.patches import cut, join, within
from ddpatch.model.stencil import StencilConvolution
from ddpatch.model.tokens import (
    Prolongation,
    Restriction,
    bspline,
    check_tokens,
    from_canvas,
    mean_blocks,
    neighbours,
    pool,
    spline_weights,
    splines,
    to_canvas,
    weighting,
)
from ddpatch.model.two_level import TwoLevelModel
from ddpatch.model.unet import Decoder, Encoder
from ddpatch.parallel.collectives import Exchange
from ddpatch.parallel.comm import Communicator

CPU = torch.device("cpu")
SMALL = {"channels": (8, 8), "token_channels": 4, "tokens": 2, "coarse_width": 16, "coarse_layers": 2, "coarse_heads": 2}


def make(decomposition: Decomposition, fields: int = 2, /, **changes: object) -> tuple[TwoLevelModel, Exchange]:
    config = ModelConfig(**{**SMALL, **changes})  # type: ignore[arg-type]
    torch.manual_seed(1)
    model = TwoLevelModel(fields, decomposition.ndim, config, decomposition.periodic).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model, Exchange(decomposition, Communicator(), config.reach)


def evaluate(model: TwoLevelModel, exchange: Exchange, field: Tensor) -> Tensor:
    with torch.no_grad():
        noise = torch.linspace(-1, 1, len(field), dtype=torch.float64)
        return join(model(cut(field, exchange.decomposition), noise, exchange), exchange.decomposition)


@pytest.mark.parametrize(("grid", "patch", "periodic"), CASES)
def test_one_code_path_for_two_and_three_axes(grid: tuple[int, ...], patch: tuple[int, ...], periodic: tuple[bool, ...]) -> None:
    decomposition = Decomposition(grid, patch, 1, periodic)
    model, exchange = make(decomposition, 1, **one_level(patch))
    out = evaluate(model, exchange, random_field(2, 1, grid))
    assert out.shape == (2, 1, *grid)
    assert bool(out.isfinite().all())


def one_level(patch: tuple[int, ...]) -> dict[str, object]:
    return {"channels": (8,), "tokens": 1, "halo": min(2, *patch)}


def test_homogeneous_model_commutes_with_shifts_by_a_patch() -> None:
    decomposition = Decomposition((16, 24), (8, 8))
    model, exchange = make(decomposition)
    field = random_field(2, 2, (16, 24))
    shifted = evaluate(model, exchange, field.roll((8, -8), (2, 3)))
    torch.testing.assert_close(shifted, evaluate(model, exchange, field).roll((8, -8), (2, 3)))


def test_positions_tell_patches_apart() -> None:
    decomposition = Decomposition((16, 24), (8, 8))
    model, exchange = make(decomposition, positions=2)
    field = random_field(2, 2, (16, 24))
    shifted = evaluate(model, exchange, field.roll(8, 2))
    assert float((shifted - evaluate(model, exchange, field).roll(8, 2)).abs().max()) > 1e-3


def test_walls_tell_patches_apart() -> None:
    decomposition = Decomposition((16, 24), (8, 8), 1, (False, True))
    model, exchange = make(decomposition)
    field = random_field(2, 2, (16, 24))
    reference = evaluate(model, exchange, field)
    torch.testing.assert_close(evaluate(model, exchange, field.roll(8, 3)), reference.roll(8, 3))
    assert float((evaluate(model, exchange, field.roll(8, 2)) - reference.roll(8, 2)).abs().max()) > 1e-3


def test_the_same_weights_run_on_other_numbers_of_patches() -> None:
    model, _ = make(Decomposition((16, 16), (8, 8)))
    wide = Decomposition((32, 24), (8, 8))
    out = evaluate(model, Exchange(wide, Communicator(), 2), random_field(1, 2, (32, 24)))
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("block", [1, 3])
def test_attention_is_that_of_a_table_of_all_pairs(block: int) -> None:
    """The logits of the module's docstring, one by one, to tokens or means of some; a head of 5 + 4 features is padded."""
    torch.manual_seed(0)
    heads, width, lengths = 2, 10, torch.tensor([4.0, 6.0], dtype=torch.float64)
    attention = GeometricAttention(2, width, heads, 3).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x, normed, embedding = (torch.randn(2, *shape, dtype=torch.float64) for shape in ((12, width), (12, width), (3,)))
    places = token_places((4, 3), CPU).flatten(0, 1)

    def pool(rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(1, (-1, block)).mean(2)

    centres = pool(places[None])[0]
    found = attention(x, normed, embedding, Audience(places, centres, lengths, pool, lambda rows: rows))
    q, k = (
        torch.nn.functional.normalize(part.unflatten(-1, (heads, -1)), dim=-1)
        for part in (attention.qk(normed)[..., :width], attention.qk(pool(normed))[..., width:])
    )
    reach = (attention.log_range + attention.range_of_noise(embedding)).exp()
    away = centres[None, :] - places[:, None] - attention.centre[:, None, None]
    stiffness = (lengths / (2 * math.pi * reach[..., None])).square()[:, :, None, None]
    logits = math.sqrt(width / heads) * attention.sharpness.exp()[:, None, None] * torch.einsum("bxhc,byhc->bhxy", q, k)
    logits = logits + (stiffness * ((2 * math.pi * away / lengths).cos() - 1)).sum(-1)
    values = attention.v(pool(x)).unflatten(-1, (heads, -1))
    expected = attention.out(torch.einsum("bhxy,byhc->bxhc", logits.softmax(-1), values).flatten(2))
    torch.testing.assert_close(found, expected)


def test_on_a_larger_domain_attention_keeps_its_physical_reach() -> None:
    """Patches that the training domain would have folded onto each other stay far apart, and the answer hardly changes."""
    model, _ = make(Decomposition((64, 16), (8, 8)))
    for module in model.modules():
        if isinstance(module, GeometricAttention):
            module.log_range.data.fill_(-0.5)
            module.centre.data.clamp_(-1, 1)
            module.range_of_noise.weight.data.zero_()
            module.range_of_noise.bias.data.zero_()
    field, long = random_field(1, 2, (128, 16)), Exchange(Decomposition((128, 16), (8, 8)), Communicator(), 2)
    far = evaluate(model, long, field)
    near = evaluate(model, Exchange(Decomposition((64, 16), (8, 8)), Communicator(), 2), field[:, :, :64])
    other = field.clone()
    other[:, :, 88:104] += 1
    change = evaluate(model, long, other) - far
    assert float(change[:, :, 24:40].abs().max()) < 1e-4 * float(change.abs().max())
    torch.testing.assert_close(far[:, :, 24:40], near[:, :, 24:40], rtol=0, atol=0.05 * float(near.std()))


def changed_patches(model: TwoLevelModel, exchange: Exchange, field: Tensor, patch: int) -> set[int]:
    """The patches whose prediction depends on one patch."""
    other = field.clone()
    other[within(exchange.decomposition, patch)] += 1
    change = cut(evaluate(model, exchange, other) - evaluate(model, exchange, field), exchange.decomposition)
    return {p for p in range(change.shape[1]) if float(change[:, p].abs().max()) > 1e-12}


def test_without_the_coarse_level_a_patch_reaches_its_neighbours_only() -> None:
    decomposition = Decomposition((40, 8), (8, 8))
    field = random_field(1, 2, (40, 8))
    assert changed_patches(*make(decomposition, coupling="halo"), field, 0) == {0, 1, 4}
    assert changed_patches(*make(decomposition, coupling="none"), field, 0) == {0}
    assert changed_patches(*make(decomposition, halo=0), field, 0) == {0, 1, 2, 3, 4}


def test_one_halo_exchange_and_one_gather_per_evaluation() -> None:
    decomposition = Decomposition((16, 16), (8, 8))
    for blocks in (1, 3):
        model, exchange = make(decomposition, blocks=blocks, coarse_layers=4)
        evaluate(model, exchange, random_field(1, 2, (16, 16)))
        assert dict(exchange.comm.calls) == {"halo": 1, "allgather": 1}


def test_gradients_reach_every_parameter() -> None:
    decomposition = Decomposition((16, 16), (8, 8), 1, (True, False))
    model, exchange = make(decomposition, positions=1, channels=(8, 8, 8))
    x = cut(random_field(2, 2, (16, 16)), decomposition)
    model(x, torch.zeros(2, dtype=torch.float64), exchange).square().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or float(p.grad.abs().max()) == 0]
    assert silent == []


def test_restriction_carries_means_that_overlap_as_far_as_they_may() -> None:
    """Along the first axis means of 4 points, along the second of 6 with a window of 5 points, which reaches 2 beyond."""
    restriction = Restriction(2, latent=3, features=4, tokens=2).double()
    window, sigma = random_field(5, 2, (14, 18)), torch.linspace(0.1, 10, 5, dtype=torch.float64)
    tokens = restriction(random_field(5, 3, (4, 6)), window[:, None], sigma, 3, (0, 2))[:, 0]
    smooth = window[:, :, 3:-3].unfold(3, 5, 1).mean(-1)[..., 1:-1]
    means = smooth.reshape(5, 2, 2, 4, 2, 6).mean((3, 5)).flatten(2).transpose(1, 2)
    kernels = weighting(4, 0), weighting(6, 2)
    assert [len(h) for h in kernels] == [4, 10] and all(float(h.sum()) == pytest.approx(1) for h in kernels)
    noise = float(kernels[0].square().sum() * kernels[1].square().sum())
    scale = ((1 + sigma**2) / (1 + sigma**2 * noise)).sqrt()
    torch.testing.assert_close(tokens[..., 4:], means * scale[:, None, None])


@pytest.mark.parametrize(("patch_grid", "keys"), [((3, 2), 2), ((3, 2), 4), ((2, 1, 3), 1), ((2, 1, 3), 2)])
def test_means_of_tokens_are_those_of_blocks_in_place(patch_grid: tuple[int, ...], keys: int) -> None:
    ndim = len(patch_grid)
    canvas = random_field(2, 5, tuple(4 * n for n in patch_grid)).movedim(1, -1)
    found = mean_blocks(from_canvas(canvas, patch_grid, 4).flatten(1, 2), 4, keys, ndim)
    pool = torch.nn.functional.avg_pool2d if ndim == 2 else torch.nn.functional.avg_pool3d
    blocks = pool(canvas.movedim(-1, 1), 4 // keys).movedim(1, -1)
    torch.testing.assert_close(found, from_canvas(blocks, patch_grid, keys).flatten(1, 2))


def spread(canvas: Tensor, decomposition: Decomposition, degree: int = 2, rim: int = 0) -> Tensor:
    """Splines on all patches, ``[sample, patch, channel, *points]``."""
    return splines(canvas, decomposition, range(decomposition.num_patches), degree, rim).points().unflatten(0, (len(canvas), -1))


@pytest.mark.parametrize("degree", [2, 5])
@pytest.mark.parametrize("periodic", [(True, True), (False, True), (False, False)])
def test_prolongation_does_not_see_patch_borders(periodic: tuple[bool, bool], degree: int) -> None:
    """Interpolated patch by patch or on the whole canvas, tokens give the same field."""
    prolongation, canvas = Prolongation(2, width=3, latent=1, fine=2).double(), random_field(2, 3, (4, 6)).movedim(1, -1)
    coefficients, fields = prolongation.fine(canvas), []
    assert coefficients is not None
    for patch in ((8, 8), (16, 24)):
        decomposition = Decomposition((16, 24), patch, 1, periodic)
        fields.append(join(spread(coefficients, decomposition, degree), decomposition))
    torch.testing.assert_close(fields[0], fields[1])
    assert fields[0].shape == (2, 2, 16, 24)


def test_the_rim_of_splines_is_what_neighbours_have() -> None:
    decomposition, canvas = Decomposition((16, 24), (8, 8)), random_field(2, 3, (4, 6)).movedim(1, -1)
    field, wide = join(spread(canvas, decomposition), decomposition), spread(canvas, decomposition, rim=3)
    around = torch.nn.functional.pad(field, (3, 3, 3, 3), mode="circular")
    torch.testing.assert_close(wide[:, 4], around[..., 8:22, 8:22])  # the patch in the second row and column


@pytest.mark.parametrize("degree", [2, 3, 5])
def test_interpolation_reproduces_linear_functions(degree: int) -> None:
    ring, rim = neighbours(degree, rim=2, cell=4), 2
    weights = spline_weights(4, 4, degree, ring, rim, CPU)
    centres = torch.arange(-ring, 4 + ring, dtype=torch.float64) + 0.5
    points = (torch.arange(-rim, 16 + rim, dtype=torch.float64) + 0.5) / 4
    torch.testing.assert_close((2 * centres - 3) @ weights, 2 * points - 3)
    torch.testing.assert_close(weights.sum(0), torch.ones(20, dtype=torch.float64))


def test_splines_of_degree_two() -> None:
    """A point at distance t from the nearest centre weighs it with 3/4 - t², and the two beside it with (1/2 ± t)² / 2."""
    t = torch.linspace(-0.5, 0.4, 10, dtype=torch.float64)
    torch.testing.assert_close(bspline(t, 2), 0.75 - t.square())
    torch.testing.assert_close(bspline(t - 1, 2), (0.5 + t).square() / 2)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("ndim", [2, 3])
def test_merged_features_are_those_of_gains_interpolation_and_convolution(ndim: int, samples: int) -> None:
    """Gains scale weights, and coarse features are mapped before they are interpolated: the same values, the same gradients."""
    torch.manual_seed(0)
    gain, conv = Gain(6, 4).double(), CONV[ndim](6, 3, 1).double()
    for parameter in gain.parameters():
        torch.nn.init.normal_(parameter)
    batch = 2 * samples
    embedding = torch.randn(samples, 4, dtype=torch.float64)
    coarse, skip, other = (
        torch.randn(batch, 3, *shape, dtype=torch.float64).requires_grad_() for shape in ([4] * ndim, [10] * ndim, [4] * ndim)
    )
    inputs = [coarse, skip, other, *gain.parameters(), *conv.parameters()]
    features = torch.cat([doubled(coarse, rim=1).points(), skip], dim=1)
    expected = conv(gain(features, embedding.repeat_interleave(2, dim=0))) + doubled(other, rim=1).points()
    to_coarse, to_skip = gain.scaled(conv, embedding).chunk(2, dim=2)
    assert conv.bias is not None
    parts = [doubled(map_rows(coarse, to_coarse), rim=1), doubled(other, rim=1)]
    found = merge(skip, to_skip, conv.bias, parts)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), inputs) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_cells_that_close_on_themselves_are_interpolated_around_the_end() -> None:
    x = random_field(1, 2, (4, 6))
    around = doubled(torch.nn.functional.pad(x, (1, 1, 1, 1), mode="circular")).points()
    torch.testing.assert_close(doubled(x, wraps=True).points(), around[..., 2:-2, 2:-2])


def test_norms_of_one_sample_take_over_its_scale_and_shift() -> None:
    """A sample on its own has the values and gradients that it has beside another one."""
    torch.manual_seed(0)
    norm, x = PointNorm(3).double(), random_field(4, 3, (4, 4)).requires_grad_()
    scale, shift = (torch.randn(2, 3, dtype=torch.float64).requires_grad_() for _ in range(2))
    together = norm(x, scale, shift)
    alone = torch.cat([norm(x[2 * i :][:2], scale[i : i + 1], shift[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(alone, together)
    inputs, weights = [x, scale, shift, *norm.parameters()], torch.randn_like(together)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), inputs) for y in (alone, together)), strict=True):
        torch.testing.assert_close(a, b)


def test_refinement_reproduces_linear_functions_up_to_the_rim() -> None:
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    fine_y, fine_x = torch.meshgrid(torch.arange(8.0) / 2 - 0.25, torch.arange(12.0) / 2 - 0.25, indexing="ij")
    torch.testing.assert_close(doubled((3 * y - x)[None, None]).points(), (3 * fine_y - fine_x)[None, None])
    torch.testing.assert_close(doubled(torch.full((1, 1, 1, 1), 2.0)).points(), torch.full((1, 1, 2, 2), 2.0))
    wide = doubled((3 * y - x)[None, None], rim=2).points()
    torch.testing.assert_close(wide, torch.nn.functional.pad((3 * fine_y - fine_x)[None, None], (2,) * 4, mode="replicate"))


def test_the_finest_level_sees_a_rim_of_the_window() -> None:
    """What a patch's neighbours have next to the border reaches its last convolutions."""
    torch.manual_seed(0)
    encoder = Encoder(2, 1, 0, [4, 8], blocks=1, halo=3, rim=1, embedding=4).double()
    decoder = Decoder(2, 1, [4, 8], blocks=1, rim=1, embedding=4).double()
    for name, parameter in decoder.named_parameters():
        if "conv2" in name or "out" in name:
            torch.nn.init.normal_(parameter)
    sigma, embedding = torch.ones(1, dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64)
    latent, skips = encoder(random_field(1, 1, (14, 14))[None], torch.zeros(1, 0, 14, 14, dtype=torch.float64), sigma, embedding)
    assert latent.shape == (1, 8, 4, 4) and skips[0].shape == (1, 4, 10, 10)
    before = decoder(latent, skips, embedding)
    skips[0][:, :, 0] += 1
    changed = (decoder(latent, skips, embedding) - before).abs().amax((0, 1, 3)) > 1e-9
    assert before.shape == (1, 1, 8, 8)
    assert changed.tolist() == [True] + [True] + [False] * 6


def test_tokens_are_where_their_places_say() -> None:
    patch_grid, q = (2, 3), 2
    decomposition = Decomposition((4, 6), (2, 2))
    where = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij"))[None] + 0.5
    tokens = cut(where, decomposition).flatten(3).transpose(2, 3)
    torch.testing.assert_close(to_canvas(tokens, patch_grid, q)[0].double(), token_places([n * q for n in patch_grid], CPU))
    torch.testing.assert_close(from_canvas(to_canvas(tokens, patch_grid, q), patch_grid, q), tokens)


@pytest.mark.parametrize(
    ("patch", "tokens", "levels", "message"),
    [((16, 16), 3, 1, "3 tokens per axis do not divide"), ((12, 16), 4, 4, "4 levels need a domain.patch divisible by 8")],
)
def test_patches_that_do_not_fit_the_network_are_refused(patch: tuple[int, ...], tokens: int, levels: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_tokens(patch, tokens, levels)


def test_the_first_convolution_whitens_stencils_at_every_noise_level() -> None:
    """With unit weights the outputs are uncorrelated and of unit variance, and do not depend on the basis of eigenvectors."""
    sigma = torch.tensor([0.05, 1.0, 20.0], dtype=torch.float64)
    fields = torch.from_numpy(smooth_fields(64, 1, (32, 32))).double()
    stencils = fields.unfold(2, 3, 1).unfold(3, 3, 1).reshape(-1, 9)
    convolution = StencilConvolution(2, 1, 9).double()
    convolution.whiten(stencils.T @ stencils / len(stencils))
    convolution.weight.data.copy_(torch.eye(9))
    s = sigma.view(-1, 1, 1, 1, 1)
    noisy = (fields + s * random_field(64, 1, (32, 32))) / (1 + s**2).sqrt()
    out = convolution(noisy, sigma).unflatten(0, (3, 64)).transpose(1, 2).flatten(2)
    covariance = out @ out.transpose(1, 2) / out.shape[-1]
    torch.testing.assert_close(covariance, torch.eye(9, dtype=torch.float64).expand(3, 9, 9), atol=0.1, rtol=0)


def test_without_blocks_the_fine_level_is_linear() -> None:
    """At first every block is the identity: what leads from input to output is a linear filter, for each noise level."""
    decomposition = Decomposition((16, 16), (8, 8))
    config = ModelConfig(**{**SMALL, "coupling": "halo", "halo": 1})  # type: ignore[arg-type]
    model = TwoLevelModel(2, 2, config, (True, True)).double()
    torch.nn.init.normal_(model.decoder.out.weight)
    exchange = Exchange(decomposition, Communicator(), 1)
    a, b = random_field(2, 2, (16, 16)), random_field(2, 2, (16, 16), seed=1)
    zero = evaluate(model, exchange, torch.zeros_like(a))
    linear = evaluate(model, exchange, a) + 3 * evaluate(model, exchange, b) - 3 * zero
    torch.testing.assert_close(evaluate(model, exchange, a + 3 * b), linear)


def test_a_block_that_sheds_a_point_leaves_out_what_padding_would_make_of_it() -> None:
    """The points inside are the same."""
    torch.manual_seed(0)
    padded, shedding = (ResidualBlock(2, 3, 4, 5, shed=shed).double() for shed in (0, 1))
    for p in padded.parameters():
        nn.init.normal_(p)
    shedding.load_state_dict(padded.state_dict())
    x, embedding = torch.randn(2, 3, 8, 9).double(), torch.randn(2, 5).double()
    torch.testing.assert_close(shedding(x, embedding), padded(x, embedding)[:, :, 1:-1, 1:-1])


@pytest.mark.parametrize(("points", "blocks"), [(8, 4), (4, 8), (3, 4), (6, 4), (4, 4)])
def test_pooling_is_that_of_torch(points: int, blocks: int) -> None:
    """Means over blocks, repetition, and whatever lies between."""
    x = torch.randn(2, 3, points, points, dtype=torch.float64)
    torch.testing.assert_close(pool(x, (blocks, blocks)), F.adaptive_avg_pool2d(x, (blocks, blocks)))
