"""Every transport on GPUs, against the same on the CPU. The ranks share GPUs where there are fewer, except over NCCL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from problems import TRANSPORTS, random_field, small_config, write_fields
from torch import Tensor

from ddpatch.data.fields import FieldFile
from ddpatch.decomposition import Decomposition
from ddpatch.errors import UserError
from ddpatch.model.patches import cut
from ddpatch.parallel.collectives import Exchange
from ddpatch.parallel.comm import Communicator
from ddpatch.run import measure_field, resolve
from ddpatch.sample import Sampler
from ddpatch.train import train
from ddpatch.training import Training

pytestmark = pytest.mark.mpi(min_size=1)

GRID, PATCH = (10, 6), (2, 3)


@pytest.fixture(params=TRANSPORTS)
def gpus(comm: Communicator, request: pytest.FixtureRequest) -> Iterator[Communicator]:
    """A communicator whose transport carries tensors of GPUs; skipped on all ranks where it cannot, with the reason."""
    if not all(comm.gather(torch.cuda.is_available())):
        pytest.skip("not every rank sees a GPU")
    try:
        comm.connect(request.param, comm.place("cuda", share=True))
    except UserError as refused:
        pytest.skip(str(refused))
    yield comm
    torch.use_deterministic_algorithms(False)


def collectives(comm: Communicator, device: torch.device) -> list[Tensor]:
    """What every collective makes of whole numbers, whose sums are exact in any order."""
    counts = [rank + 1 for rank in range(comm.size)]
    rows = torch.arange(2.0 * sum(counts), device=device).view(-1, 2)
    own = rows[: counts[comm.rank]] * (comm.rank + 1)
    pieces = [torch.full((comm.rank + 1, to + 1), complex(comm.rank, to), device=device) for to in range(comm.size)]
    pending = [comm.start_sum(rows.reshape(-1) + n + comm.rank) for n in range(3)]
    results = [comm.allgather(own, counts), comm.allgather(own > 2, counts), comm.reduce_scatter(rows * (comm.rank + 1), counts)]
    results += comm.alltoall(pieces, [(source + 1, comm.rank + 1) for source in range(comm.size)])
    results += [comm.finish_sum(sum_on_its_way) for sum_on_its_way in pending]
    return [*results, comm.allreduce_(rows.double() + comm.rank), comm.allgather(torch.ones(1), [1] * comm.size)]


def coupling(comm: Communicator, device: torch.device) -> list[Tensor]:
    """Windows and tokens of a field, and what their backward passes make of them."""
    decomposition = Decomposition(GRID, PATCH, comm.size)
    exchange = Exchange(decomposition, comm, 2)
    results: list[Tensor] = []
    for method in (exchange.halo, exchange.gather):
        x = cut(random_field(2, 3, GRID), decomposition, exchange.patches).to(device).requires_grad_()
        out = method(x)
        with torch.autograd.set_multithreading_enabled(False):
            (out * (1 + out.detach())).sum().backward()
        assert x.grad is not None
        results += [out.detach(), x.grad]
    return results


@pytest.mark.parametrize("deterministic", [False, True])
def test_collectives_are_those_of_the_cpu(gpus: Communicator, deterministic: bool) -> None:
    gpus.deterministic = deterministic
    for work in (collectives, coupling):
        expected = work(gpus, torch.device("cpu"))  # which goes through host memory whatever the transport
        for _ in range(20):  # a buffer that is read too early, or used too late, shows sooner or later
            found = work(gpus, gpus.device)
            assert [tensor.device.type for tensor in found].count("cuda") >= len(found) - 1
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a.cpu(), b, rtol=1e-12, atol=1e-12)


def begin(gpus: Communicator, file: FieldFile, dtype: str, device: str) -> Training:
    """A training on the GPUs, as the ranks are connected, or on the CPU."""
    on_gpus: dict[str, object] = {"device": "cuda", "transport": gpus.connected, "share_device": True}
    config = resolve(small_config(file.path, dtype, parallel=on_gpus if device == "cuda" else {"device": "cpu"}), file)
    return Training(config, file, measure_field(config, file, gpus), gpus)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-7), ("float32", 1e-5)])
def test_losses_are_those_of_the_cpu(gpus: Communicator, shared_path: Path, dtype: str, tolerance: float) -> None:
    """In float32 too, since no factors are rounded to TF32."""
    data, losses = gpus.on_root(lambda: write_fields(shared_path / "data.h5")), []
    with FieldFile(data) as file:
        for device in ("cuda", "cpu"):  # in this order, since a training on CPUs connects the ranks anew
            training = begin(gpus, file, dtype, device)
            losses.append([training.advance() for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)


def test_a_deterministic_run_repeats_bit_for_bit(gpus: Communicator, shared_path: Path) -> None:
    gpus.deterministic = True
    data, found = gpus.on_root(lambda: write_fields(shared_path / "data.h5")), []
    with FieldFile(data) as file:
        for _ in range(2):
            training = begin(gpus, file, "float32", "cuda")
            losses = [training.advance() for _ in range(3)]
            found.append((losses, [p.detach().clone() for p in training.model.parameters()]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_fields_in_host_memory_give_the_same_samples_and_leave_the_gpu(gpus: Communicator, shared_path: Path) -> None:
    """On 1024 patches, of which one at a time is on the GPU."""
    data = gpus.on_root(lambda: write_fields(shared_path / "data.h5", grid=(64, 64)))
    parallel: dict[str, object] = {"device": "cuda", "transport": gpus.connected, "share_device": True}
    execution: dict[str, object] = {"patches_at_once": 1}
    domain: dict[str, object] = {"patch": [16, 16]}
    config = small_config(data, train={"steps": 1}, parallel=parallel, domain=domain, execution=execution)
    train(config, shared_path / "run", gpus)
    drawn, peaks = [], []
    for where in ("false", "true"):
        sampler = Sampler(shared_path / "run", gpus, (512, 512), [f"sample.on_host={where}", "execution.patches_at_once=1"])
        torch.cuda.reset_peak_memory_stats()
        for _ in range(5):  # a buffer that is used again too early shows sooner or later
            drawn.append(sampler.draw([0], seed=1, solver="dpm++2m", steps=3, shift=True))
        peaks.append(torch.cuda.max_memory_allocated())
    field = drawn[0].nbytes
    assert {x.device.type for x in drawn[5:]} == {"cpu"}
    for x in drawn[1:]:
        torch.testing.assert_close(x.cpu(), drawn[0].cpu(), rtol=1e-7, atol=1e-7)
    assert peaks[0] - peaks[1] > 3 * field
