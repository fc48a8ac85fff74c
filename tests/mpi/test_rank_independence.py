"""One rank against many: outputs, gradients, losses and samples are the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from problems import TRANSPORTS, connect, field_of, random_field, small_config, write_fields

from ddpatch.config import Config
from ddpatch.data.fields import FieldFile
from ddpatch.data.gaussian import PowerLaw
from ddpatch.decomposition import Decomposition
from ddpatch.model.patches import cut
from ddpatch.parallel.collectives import Exchange
from ddpatch.parallel.comm import Communicator
from ddpatch.parallel.gradients import GradientSum
from ddpatch.run import make_model, measure_field, resolve
from ddpatch.sample import Sampler, sample
from ddpatch.train import train
from ddpatch.training import Training

pytestmark = pytest.mark.mpi(min_size=1)

GRIDS = [((16, 24), (8, 8), (True, True)), ((20, 8), (4, 8), (False, True)), ((8, 8, 12), (4, 4, 12), (True, True, False))]


@pytest.mark.parametrize(("grid", "patch", "periodic"), GRIDS)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_output_and_gradients_equal_the_serial_ones(
    comm: Communicator, grid: tuple[int, ...], patch: tuple[int, ...], periodic: tuple[bool, ...], transport: str
) -> None:
    config = small_config(Path("none"), domain={"patch": patch, "grid": grid, "periodic": periodic}, model={"positions": 1})
    alone = comm.split(comm.rank)
    waves = tuple(4 * (n // p) // 2 for n, p in zip(grid, patch, strict=True))
    field = field_of(PowerLaw().power(grid), 2, tuple(2 if wraps else 0 for wraps in periodic), waves)
    results = []
    for ranks in (alone, connect(comm, transport)):
        decomposition = Decomposition(grid, patch, ranks.size, periodic)
        exchange = Exchange(decomposition, ranks, 2)
        model = make_model(config, field)
        for i, parameter in enumerate(model.parameters()):
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(i))
        x = cut(random_field(2, 2, grid), decomposition, exchange.patches).requires_grad_()
        out = model(x, torch.tensor([-1.0, 1.0], dtype=torch.float64), exchange)
        (out * cut(random_field(2, 2, grid, seed=9), decomposition, exchange.patches)).sum().backward()
        GradientSum(model.parameters(), ranks).finish()
        assert x.grad is not None
        results.append((out.detach(), x.grad, [p.grad for p in model.parameters()]))
    own = slice(exchange.patches.start, exchange.patches.stop)
    (out_1, dx_1, dp_1), (out_n, dx_n, dp_n) = results
    for found, expected in [(out_n, out_1[:, own]), (dx_n, dx_1[:, own]), *zip(dp_n, dp_1, strict=True)]:
        assert found is not None and expected is not None
        scale = float(expected.abs().max())  # of the tensor: an element may be a small difference of large sums
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * scale)
        assert scale > 0


def losses(config: Config, comm: Communicator, steps: int) -> list[float]:
    with FieldFile(config.data.path) as file:
        config = resolve(config, file)
        training = Training(config, file, measure_field(config, file, comm), comm)
        return [training.advance() for _ in range(steps)]


def test_moments_do_not_depend_on_the_number_of_ranks(comm: Communicator, shared_path: Path) -> None:
    data = comm.on_root(lambda: write_fields(shared_path / "data.h5"))
    with FieldFile(data) as file:
        config = resolve(small_config(data), file)
        serial, parallel = (measure_field(config, file, ranks).moments for ranks in (comm.split(comm.rank), comm))
    assert serial is not None and parallel is not None
    torch.testing.assert_close(parallel, serial, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
def test_losses_of_five_steps_do_not_depend_on_the_number_of_ranks(
    comm: Communicator, shared_path: Path, dtype: str, tolerance: float
) -> None:
    data = comm.on_root(lambda: write_fields(shared_path / "data.h5"))
    comm.deterministic = True
    config = small_config(data, dtype, domain={"patch": [8, 4]})
    serial, parallel = losses(config, comm.split(comm.rank), 5), losses(config, comm, 5)
    assert parallel == pytest.approx(serial, rel=tolerance)
    assert serial[0] != serial[-1]


@pytest.mark.parametrize(("solver", "shift"), [("heun", False), ("dpm++2m", True)])
def test_samples_do_not_depend_on_the_number_of_ranks(comm: Communicator, shared_path: Path, solver: str, shift: bool) -> None:
    data = comm.on_root(lambda: write_fields(shared_path / "data.h5"))
    train(small_config(data, "float32"), shared_path / "run", comm)
    drawn = []
    for ranks in (comm.split(comm.rank), comm):
        sampler = Sampler(shared_path / "run", ranks)
        drawn.append(sampler.draw([3, 8], seed=1, solver=solver, steps=10, shift=shift))
    own = slice(sampler.coupling.patches.start, sampler.coupling.patches.stop)
    torch.testing.assert_close(drawn[1], drawn[0][:, own], rtol=1e-4, atol=1e-4)


def test_samples_do_not_depend_on_how_many_are_drawn_at_a_time(comm: Communicator, shared_path: Path) -> None:
    data = comm.on_root(lambda: write_fields(shared_path / "data.h5"))
    train(small_config(data, "float32"), shared_path / "run", comm)
    drawn = []
    for together in ("null", "1", "3"):
        path = shared_path / f"{together}.h5"
        sample(Sampler(shared_path / "run", comm, overrides=[f"sample.batch={together}"]), path, 4, steps=3)
        with FieldFile(path) as file:
            drawn.append(torch.stack([torch.from_numpy(file.read(i, (0, 0), (16, 24))) for i in range(4)]))
    torch.testing.assert_close(drawn[1], drawn[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drawn[2], drawn[0], rtol=1e-4, atol=1e-4)


def test_a_run_continues_on_another_number_of_ranks(comm: Communicator, shared_path: Path) -> None:
    """Three steps on one rank and three on all equal six on one."""
    data = comm.on_root(lambda: write_fields(shared_path / "data.h5"))
    alone = comm.split(comm.rank)
    config = small_config(data, train={"steps": 6, "checkpoint_every": 3})
    whole = shared_path / f"whole{comm.rank}"
    train(config, whole, alone)
    first = comm.on_root(lambda: interrupted(config, shared_path / "parts", alone))
    assert first == 3
    train(config, shared_path / "parts", comm)
    states = [torch.load(folder / "checkpoint_00000006.pt", weights_only=True) for folder in (whole, shared_path / "parts")]
    for key in ("model", "ema"):
        torch.testing.assert_close(states[1][key], states[0][key], rtol=1e-10, atol=1e-10)
    assert states[1]["samples_seen"] == 12


def interrupted(config: Config, folder: Path, comm: Communicator) -> int:
    """A run that ends after the first checkpoint; the number of steps it made."""
    rows: list[int] = []

    def stop(row: dict[str, int]) -> None:
        rows.append(row["step"])
        if row["step"] > 3:
            raise KeyboardInterrupt

    try:
        train(config, folder, comm, stop)
    except KeyboardInterrupt:
        return rows[-2]
    return -1


@pytest.mark.mpi(min_size=2)
def test_a_deterministic_run_repeats_bit_for_bit(comm: Communicator, shared_path: Path) -> None:
    data = comm.on_root(lambda: write_fields(shared_path / "data.h5"))
    comm.deterministic = True
    config = small_config(data, "float32")
    assert losses(config, comm, 3) == losses(config, comm, 3)


def test_an_evaluation_sends_a_halo_and_tokens_and_nothing_else(comm: Communicator, shared_path: Path) -> None:
    decomposition = Decomposition((16, 24), (8, 8), comm.size)
    config = small_config(Path("none"), domain={"patch": [8, 8], "grid": [16, 24], "periodic": [True, True]})
    exchange, model = (
        Exchange(decomposition, comm, 2),
        make_model(config, field_of(PowerLaw().power((16, 24)), 2, (2, 2), (4, 6))),
    )
    with torch.no_grad():
        model(cut(random_field(1, 2, (16, 24)), decomposition, exchange.patches), torch.zeros(1, dtype=torch.float64), exchange)
    assert comm.calls == {"halo": 1, "allgather": 1}
    assert comm.bytes["allgather"] == len(exchange.patches) * 16 * (4 + 2) * 8
