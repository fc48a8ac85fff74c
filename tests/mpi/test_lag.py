"""Communication behind computation: what is computed while tokens travel, and a coarse level that lags an evaluation behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import field_of, random_field, small_config, write_fields
from torch import Tensor

from ddpatch.data.gaussian import PowerLaw
from ddpatch.model.coupling import Arrival, Lag
from ddpatch.model.patches import cut
from ddpatch.model.two_level import Message, TwoLevelModel
from ddpatch.parallel.collectives import Exchange
from ddpatch.parallel.comm import Communicator
from ddpatch.run import decompose, make_denoiser, make_model, stencil_reach
from ddpatch.sample import Sampler
from ddpatch.train import train

pytestmark = pytest.mark.mpi(min_size=1)
GRID = (16, 24)
Denoise = Callable[[Tensor, Tensor], Tensor]


def denoisers(
    comm: Communicator, coarse: str = "auto", points: tuple[int, int] = GRID, at_once: int | None = None
) -> tuple[TwoLevelModel, Exchange, Denoise, Denoise, Lag[Message]]:
    """A network with weights that are not those of the start, and its denoisers without and with a lag."""
    config = small_config(
        Path("none"),
        domain={"grid": points, "patch": (8, 8), "periodic": (True, True)},
        execution={"coarse": coarse, "patches_at_once": at_once},
    )
    grid = decompose(config, comm.size)
    waves = tuple(config.model.tokens * n // p // 2 for n, p in zip(points, (8, 8), strict=True))
    field = field_of(PowerLaw().power(points), 2, stencil_reach(config), waves)
    model, exchange, lag = make_model(config, field), Exchange(grid, comm, config.model.reach), Lag[Message]()
    for i, parameter in enumerate(model.parameters()):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(i))
    plain, lagged = (make_denoiser(config, field, model, exchange, each) for each in (None, lag))
    return model, exchange, plain, lagged, lag


def own(exchange: Exchange, seed: int) -> Tensor:
    return cut(random_field(1, 2, exchange.decomposition.grid_shape, seed), exchange.decomposition, exchange.patches)


def happened(model: TwoLevelModel, exchange: Exchange, denoise: Denoise, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What an evaluation does, in order."""
    order: list[str] = []

    def noted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: object) -> object:
            order.append(name)
            return method(*args)

        return call

    start_halo, start_gather, linear = exchange.start_halo, exchange.start_gather, model.linear
    assert linear is not None

    def halo(x: Tensor) -> Arrival:
        arrival = start_halo(x)
        return arrival._replace(wait=noted("end_halo", arrival.wait))

    monkeypatch.setattr(exchange, "start_halo", noted("start_halo", halo))
    monkeypatch.setattr(exchange, "start_gather", noted("start_gather", lambda x: noted("end_gather", start_gather(x))))
    monkeypatch.setattr(linear, "fine", noted("fine", linear.fine))
    monkeypatch.setattr(model.encoder, "forward", noted("encode", model.encoder.forward))
    with torch.no_grad():
        denoise(own(exchange, 0), torch.ones(1, dtype=torch.float64))
    return order


def test_the_linear_part_is_computed_while_tokens_travel(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    model, exchange, denoise, *_ = denoisers(comm)
    order = happened(model, exchange, denoise, monkeypatch)
    assert order == ["start_halo", "end_halo", "encode", "start_gather", "fine", "end_gather"]


def test_patches_among_own_ones_are_encoded_while_halos_travel(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 patches on a ring: of those of a rank all but the first and the last have their neighbours on it."""
    model, exchange, denoise, *_ = denoisers(comm, points=(128, 8), at_once=1)
    order = happened(model, exchange, denoise, monkeypatch)
    patches, outer = len(exchange.patches), 2 * (comm.size > 1)
    first = ["start_halo", *["encode"] * (patches - outer), "end_halo", *["encode"] * outer, "start_gather", "end_gather"]
    assert order[: len(first)] == first


@torch.no_grad()
def test_the_order_of_patches_changes_no_result(comm: Communicator) -> None:
    _, exchange, together, *_ = denoisers(comm, points=(128, 8))
    one_by_one, sigma = denoisers(comm, points=(128, 8), at_once=1)[2], torch.ones(1, dtype=torch.float64)
    torch.testing.assert_close(one_by_one(own(exchange, 0), sigma), together(own(exchange, 0), sigma))


@pytest.mark.parametrize("coarse", ["replicated", "sharded"])
@torch.no_grad()
def test_the_coarse_level_speaks_of_the_evaluation_before(comm: Communicator, coarse: str) -> None:
    _, exchange, denoise, lagged, lag = denoisers(comm, coarse)
    x, y = own(exchange, 0), own(exchange, 1)
    high, low = (torch.tensor([s], dtype=torch.float64) for s in (2.0, 0.5))
    torch.testing.assert_close(lagged(x, high), denoise(x, high))  # nothing before
    torch.testing.assert_close(lagged(x, high), denoise(x, high))
    first = lagged(y, low)
    assert not torch.allclose(first, denoise(y, low), rtol=1e-3)
    torch.testing.assert_close(lagged(y, low), denoise(y, low))
    lag.end()
    torch.testing.assert_close(lagged(x, high), denoise(x, high))  # a new beginning
    lag.end()


@torch.no_grad()
def test_a_distant_patch_is_heard_an_evaluation_later(comm: Communicator) -> None:
    _, exchange, _, lagged, lag = denoisers(comm)
    sigma = torch.ones(1, dtype=torch.float64)

    def field(change: float) -> Tensor:
        whole = random_field(1, 2, GRID, 0)
        whole[..., 2:6, 2:6] += change  # inside of the patch in the corner, beyond the reach of any halo
        return cut(whole, exchange.decomposition, exchange.patches)

    before, at_once, later = (lagged(field(change), sigma) for change in (0.0, 3.0, 3.0))
    others = [i for i, patch in enumerate(exchange.patches) if patch != 0]
    torch.testing.assert_close(at_once[:, others], before[:, others])
    assert not others or (later - before)[:, others].abs().max() > 1e-3
    lag.end()


def test_lagged_samples_do_not_depend_on_the_number_of_ranks(comm: Communicator, shared_path: Path) -> None:
    data = comm.on_root(lambda: write_fields(shared_path / "data.h5"))
    run, alone = shared_path / "run", comm.split(comm.rank)
    train(small_config(data, train={"steps": 3}), run, comm)
    drawn = []
    for ranks in (alone, comm):
        sampler = Sampler(run, ranks, overrides=["sample.lagged=true"])
        assert not sampler.movable
        before = ranks.calls["allgather"]
        batches = [sampler.draw([k], seed=1, solver="dpm++2m", steps=4, shift=True) for k in (0, 1)]
        assert ranks.calls["allgather"] == before + 8  # a gather per evaluation, as without lag
        drawn.append(torch.cat(batches))
    mine = list(sampler.coupling.patches)
    torch.testing.assert_close(drawn[0][:, mine], drawn[1], rtol=1e-9, atol=1e-9)
    alone.free()
