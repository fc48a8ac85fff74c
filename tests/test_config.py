from __future__ import annotations

from pathlib import Path

import pytest

from ddpatch.config import ExecutionConfig, load
from ddpatch.errors import UserError

MINIMAL = "domain: {patch: [16, 16]}\ndata: {path: data.h5}\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(MINIMAL)
    return file


def test_overrides_and_round_trip(path: Path) -> None:
    config = load(path, ["train.learning_rate=1e-4", "model.channels=[8, 16]", "domain.periodic=[true, false]"])
    assert config.train.learning_rate == 1e-4
    assert config.model.channels == (8, 16)
    path.write_text(config.as_yaml())
    assert load(path) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stps=3", r"unknown key 'train.stps', did you mean 'steps'\?"),
        ("trian.steps=3", r"unknown key 'trian', did you mean 'train'\?"),
        ("train.steps=many", "train.steps: expected int, got 'many'"),
        ("train.steps=true", "train.steps: expected int, got True"),
        ("train.steps=0", "train.steps: expected a positive number, got 0"),
        ("train.learning_rate=fast", "train.learning_rate: expected float, got 'fast'"),
        ("domain.patch=16", "domain.patch: expected a list of int, got 16"),
        ("domain.patch=[16]", "domain.patch: expected 2 or 3 numbers of points"),
        ("sample.solver=hune", r"expected one of heun, dpm\+\+2m, got 'hune', did you mean 'heun'\?"),
        ("model.coarse_width=30", "model.coarse_width: expected a multiple of 2 × coarse_heads = 8, got 30"),
        ("model.coarse_keys=3", "model.coarse_keys: expected a divisor of model.tokens = 4, got 3"),
        ("model.coupling=two-levle", r"model.coupling: expected one of .*, got 'two-levle', did you mean 'two-level'\?"),
        ("parallel.transport=nccl", "parallel.transport: expected one of host, cuda-aware, torch, got 'nccl'"),
        ("parallel.share_device=2", "parallel.share_device: expected bool, got 2"),
        ("execution.patches_at_once=0", "execution.patches_at_once: expected a positive number of patches, got 0"),
        ("train=3", "expected section.key=value"),
        ("domain.patch=[", "not valid YAML"),
    ],
)
def test_mistakes_are_one_line_that_names_them(path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(path, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {path: x}", "missing key 'domain'"),
        ("domain: {}\ndata: {path: x}", "missing key 'domain.patch'"),
        ("- 1", "expected sections"),
        ("a: [", "not valid YAML"),
        ("domain: 3\ndata: {path: x}", "domain: expected keys and values, got 3"),
    ],
)
def test_a_broken_file_is_named(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent.yaml: cannot read the configuration: No such file"):
        load(tmp_path / "absent.yaml")


def test_no_code_is_run_from_a_configuration(path: Path, tmp_path: Path) -> None:
    path.write_text(f"domain: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load(path)
    assert not (tmp_path / "made").exists()


def test_what_tuning_chooses_is_not_given() -> None:
    with pytest.raises(UserError, match=r"execution\.patches_at_once: expected null where execution\.tune chooses it, got 2"):
        ExecutionConfig(patches_at_once=2, tune=True)
