"""What a plan says of memory, bytes and time."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest
from problems import small_config

from ddpatch import rehearsal
from ddpatch.__main__ import main
from ddpatch.config import Config
from ddpatch.errors import UserError
from ddpatch.io.volume import VolumeHeader
from ddpatch.machine import Device, find_device
from ddpatch.parallel.comm import Communicator
from ddpatch.plan import PROCESS, Plan, advise, describe_attention, largest, make_plan, page, plan, read_header
from ddpatch.rehearsal import rehearse

DEVICE = Device("cpu", 1e12, 1e9, 10**8, 0.5, "given")
HEADER = VolumeHeader(1, ("u", "v"), (32, 24), (1.0, 1.0), (True, True))


@functools.cache
def planned(ranks: int, at_once: int | None = None, device: Device = DEVICE) -> Plan:
    return make_plan(config(at_once), HEADER, ranks, device)


def config(at_once: int | None = None) -> Config:
    domain = {"patch": [8, 8], "grid": [32, 24], "periodic": [True, True]}
    sections = {"domain": domain, "execution": {"patches_at_once": at_once}, "model": {"channels": [16, 16], "coarse_layers": 1}}
    return small_config(Path("none"), "float32", **sections)  # type: ignore[arg-type]


def test_parts_add_up() -> None:
    made = planned(1)
    assert made.memory == sum(made.parts.values())
    assert min(made.parts.values()) >= 0
    assert made.parts[PROCESS] == DEVICE.process
    assert made.parts["weights"] >= 4 * made.parameters
    assert made.parts["gradients"] > 0 and made.parts["moments"] >= 4 * made.parameters


def test_more_ranks_need_less_memory_send_less_halo_and_compute_less() -> None:
    one, three, twelve = (planned(n) for n in (1, 3, 12))
    assert one.memory > three.memory > twelve.memory
    assert one.costs.step.flops > three.costs.step.flops > twelve.costs.step.flops
    assert three.costs.step.sent["halo"] > twelve.costs.step.sent["halo"] > 0
    assert one.costs.step.sent["halo"] == 0


def test_groups_need_less_memory_and_compute_more() -> None:
    whole, streamed = planned(1), planned(1, at_once=2)
    assert streamed.memory < whole.memory
    assert streamed.step_seconds > whole.step_seconds
    assert streamed.costs.step.sent == whole.costs.step.sent


def test_bfloat16_needs_less_memory_and_less_time_on_a_gpu() -> None:
    full, lower = config(), dataclasses.replace(config(), execution=dataclasses.replace(config().execution, precision="bfloat16"))
    assert make_plan(lower, HEADER, 1, DEVICE).memory < planned(1).memory
    rates = [find_device("h200", each, Communicator(), 1, None, 0.3).rate for each in (full, lower)]
    assert rates[1] > 10 * rates[0]


def test_many_groups_are_extrapolated(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rehearse(config(1), HEADER, 1)
    monkeypatch.setattr(rehearsal, "FEW_GROUPS", (12, 12))
    expected = rehearse(config(1), HEADER, 1)
    for a, b in zip(found, expected, strict=True):
        assert a.memory.total() == pytest.approx(b.memory.total(), rel=5e-2)
        assert a.flops == b.flops and a.attention == b.attention > 0
        assert +a.sent == +b.sent


def test_extrapolation_does_not_mix_what_different_moments_need() -> None:
    """Tokens are most of the memory here, in some operations and for some numbers of patches."""
    domain: dict[str, object] = {"patch": [8, 8], "grid": [64, 64], "periodic": [True, True]}
    header = VolumeHeader(1, ("u", "v"), (64, 64), (1.0, 1.0), (True, True))
    for coarse in ("replicated", "sharded"):
        made = small_config(
            Path("none"), "float32", domain=domain, model={"wiener": False}, execution={"patches_at_once": 2, "coarse": coarse}
        )
        found, exact = rehearse(made, header, 2).step, rehearsal.rehearse_all(made, header, 2, 1).step
        assert found.memory.total() == pytest.approx(exact.memory.total(), rel=0.1)


def test_advice_fits_when_it_is_followed() -> None:
    needed, whole = planned(1, at_once=3).memory, planned(1)
    tight = dataclasses.replace(DEVICE, memory=needed)
    made = dataclasses.replace(whole, device=tight)
    assert not made.fits
    advice = advise(made, HEADER)
    at_once = int(advice.split("execution.patches_at_once: ")[1].split()[0])
    assert at_once >= 3
    assert planned(1, at_once, tight).fits
    assert not planned(1, at_once + 1, tight).fits


def test_nothing_fits_into_no_memory() -> None:
    made = dataclasses.replace(planned(6), device=dataclasses.replace(DEVICE, memory=1.0))
    assert advise(made, HEADER).startswith("no number of ranks fits")


def test_a_training_that_tunes_is_planned_with_one_patch_at_a_time_where_not_all_fit() -> None:
    tuned = dataclasses.replace(config(), execution=dataclasses.replace(config().execution, tune=True))
    gpu = dataclasses.replace(DEVICE, name="h200", process=0, spare=0.0)
    pages: list[str] = []
    between = (planned(1, 1, gpu).memory + planned(1, None, gpu).memory) / 2
    for memory in (between, 1e12):
        plan(tuned, 1, Communicator(), channels=2, device="h200", memory=memory / 2**30, say=pages.append)
    assert "12 on a rank, 1 at once" in pages[0] and "12 on a rank, all at once" in pages[1]


def test_largest_is_found_by_bisection() -> None:
    assert [largest(lambda n, most=most: n <= most, 10) for most in (0, 1, 7, 10, 99)] == [0, 1, 7, 10, 10]  # type: ignore[misc]


def test_the_page_names_all_parts() -> None:
    made = planned(2, at_once=1)
    text = page(made)
    assert all(part in text for part in made.parts)
    assert "6 on a rank, 1 at once" in text and "predicted" in text and "given" in text


def test_the_page_says_what_fewer_keys_leave() -> None:
    domain: dict[str, object] = {"patch": [8, 8], "grid": [64, 64], "periodic": [True, True]}
    header = VolumeHeader(1, ("u", "v"), (64, 64), (1.0, 1.0), (True, True))
    every, few = (
        make_plan(small_config(Path("none"), "float32", domain=domain, model={"coarse_keys": keys}), header, 1, DEVICE)
        for keys in (None, 2)
    )
    assert every.costs.step.attention == 4 * few.costs.step.attention
    told = describe_attention(every).split("model.coarse_keys: 2 leaves ")[1]
    assert float(told.rstrip("%")) / 100 == pytest.approx(few.costs.step.attention / few.costs.step.flops, rel=0.05)
    assert describe_attention(every) in page(every)


def test_the_command_plans_without_data_and_without_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(config().as_yaml())
    line = ["plan", str(tmp_path / "c.yaml"), "--ranks", "4", "--channels", "2"]
    assert main([*line, "--device", "h200"]) == 0
    assert "assumed, 30% of the published peak" in capsys.readouterr().out
    assert main([*line, "--memory", "0.0001"]) == 2
    shown = capsys.readouterr()
    assert "measured here" in shown.out
    assert shown.err.startswith("ddpatch: error: memory: a rank has 0.000 GiB and needs ")
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ranks": 0}, "--ranks 0: expected at least 1"),
        ({"ranks": 13}, "13 ranks cannot be divided"),
        ({"device": "h300"}, "--device: expected one of cpu, a100, h100, h200, got 'h300', did you mean 'h"),
        ({"memory": -1.0}, "--memory: expected a positive number"),
        ({"share": float("nan")}, "--share: expected a positive number, got nan"),
        ({"channels": None}, "none: no such file; without data a plan needs --channels"),
        ({"channels": 0}, "--channels 0: expected at least 1"),
    ],
)
def test_a_mistake_is_one_line(changes: dict[str, object], words: str) -> None:
    arguments = {"ranks": 1, "channels": 2, "device": "h200", **changes}
    with pytest.raises(UserError) as error:
        plan(config(), comm=Communicator(), say=lambda text: None, **arguments)  # type: ignore[arg-type]
    assert words in str(error.value) and "\n" not in str(error.value)


def test_without_data_the_grid_must_be_given() -> None:
    with pytest.raises(UserError, match=r"without data a plan needs domain\.grid"):
        read_header(small_config(Path("none")), 2)
