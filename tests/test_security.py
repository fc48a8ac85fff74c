"""Nothing that is read runs code, nothing is fetched, and nothing that is written may be changed by all users."""

from __future__ import annotations

import ast
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from problems import small_config, write_fields

SOURCES = sorted((Path(__file__).resolve().parents[1] / "ddpatch").rglob("*.py"))
UNSAFE_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "os.system",
    "os.popen",
}
UNSAFE_MODULES = {"pickle", "dill", "marshal", "shelve", "subprocess", "urllib", "requests", "http", "ftplib"}


def calls(tree: ast.Module) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_module_runs_code_that_it_reads(path: Path) -> None:
    tree = ast.parse(path.read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not {name.split(".")[0] for name in names} & UNSAFE_MODULES
    for name, call in calls(tree):
        assert name not in UNSAFE_CALLS
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert name != "torch.load" or options.get("weights_only") == "True"
        assert "allow_pickle" not in options


def test_what_a_run_writes_is_not_writable_for_all(tmp_path: Path) -> None:
    config = small_config(write_fields(tmp_path / "data.h5"), "float32", train={"steps": 1})
    (tmp_path / "config.yaml").write_text(config.as_yaml())
    run, samples = tmp_path / "made" / "run", tmp_path / "drawn" / "samples.h5"
    for verb in (
        ["train", str(tmp_path / "config.yaml"), "--run", str(run)],
        ["sample", str(run), "--count", "1", "--output", str(samples)],
    ):
        line = [sys.executable, "-m", "ddpatch", *verb]
        subprocess.run(line, check=True, capture_output=True, umask=0, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    made = [path for folder in (run.parent, samples.parent) for path in (folder, *folder.rglob("*")) if not path.is_symlink()]
    assert len(made) > 5
    assert [path for path in made if path.stat().st_mode & stat.S_IWOTH] == []
