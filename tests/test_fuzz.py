"""Whatever is in a configuration or in a file of fields: it runs, or it ends with a UserError of one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import small_config, write_fields

from ddpatch.config import Config, load
from ddpatch.data.fields import FieldFile
from ddpatch.errors import UserError
from ddpatch.run import resolve

NUMBERS = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([0, 1, -1, 0.5]))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8))
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=4), st.dictionaries(st.text(max_size=4), SCALARS, max_size=2))
quick = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fields(tmp_path_factory.mktemp("data") / "data.h5")


def places() -> list[tuple[str, str]]:
    """Every key of the configuration."""
    tree = small_config(Path("data.h5")).as_dict()
    return [(section, key) for section, values in tree.items() for key in values]


def one_line(error: UserError) -> bool:
    return "\n" not in str(error) and len(str(error)) > 0


@quick
@given(st.lists(st.tuples(st.sampled_from(places()), VALUES), min_size=1, max_size=3))
def test_any_value_of_any_key(data: Path, tmp_path: Path, changes: list[tuple[tuple[str, str], Any]]) -> None:
    tree = small_config(data).as_dict()
    for (section, key), value in changes:
        tree[section][key] = value
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    try:
        config = load(path)
        with FieldFile(config.data.path, config.data.name, config.data.axes) as file:
            assert isinstance(resolve(config, file), Config)
    except UserError as error:
        assert one_line(error)


@quick
@given(st.one_of(st.text(max_size=60), VALUES.map(yaml.safe_dump)))
def test_any_text_as_a_configuration(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        load(path)
    except UserError as error:
        assert one_line(error)


@quick
@given(st.data())
def test_any_damage_to_a_file_of_fields(data: Path, tmp_path: Path, damage: st.DataObject) -> None:
    """Bytes overwritten anywhere, or the end cut off."""
    whole = bytearray(data.read_bytes())
    for place in damage.draw(st.lists(st.integers(0, len(whole) - 1), max_size=4)):
        whole[place] = damage.draw(st.integers(0, 255))
    path = tmp_path / "damaged.h5"
    path.write_bytes(whole[: damage.draw(st.one_of(st.just(len(whole)), st.integers(0, len(whole))))])
    try:
        with FieldFile(path) as file:
            for sample in range(file.header.samples):
                file.read(sample, (0,) * len(file.header.grid_shape), file.header.grid_shape)
    except UserError as error:
        assert one_line(error)
