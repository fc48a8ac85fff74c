"""The rooms and what they may know, read from the imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "ddpatch"
FLOORS = [
    ("errors", "couplings", "config", "decomposition", "random", "tables", "notice"),
    (
        *("parallel.comm", "parallel.connection", "parallel.devices", "parallel.launcher", "parallel.transport"),
        *("parallel.torch_transport", "model", "diffusion", "optimiser"),
    ),
    ("parallel", "data", "io", "statistics", "ledger"),
    (
        *("execution", "run", "log", "train", "sample", "calibrate", "calibration", "simulate", "evaluate", "info", "plan"),
        *("training", "rehearsal", "machine", "tuning", "control"),
    ),
    ("__main__",),
]


def floor(module: str) -> int:
    """The floor of the longest name in FLOORS that contains the module."""
    known = {name: i for i, names in enumerate(FLOORS) for name in names}
    return known[max((name for name in known if f"{module}.".startswith(f"{name}.")), key=len)]


@cache
def modules() -> dict[str, ast.Module]:
    names = {path: ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in sorted(PACKAGE.rglob("*.py"))}
    return {name: ast.parse(path.read_text()) for path, name in names.items() if path.name != "__init__.py"}


def imported(tree: ast.Module) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(tree: ast.Module) -> set[str]:
    known = set(modules())
    return {name.removeprefix("ddpatch.") for name in imported(tree)} & known


def test_one_module_imports_mpi4py() -> None:
    users = {name for name, tree in modules().items() if any(m.split(".")[0] == "mpi4py" for m in imported(tree))}
    assert users == {"parallel.comm"}


def test_modules_import_from_their_floor_or_below() -> None:
    above = {(name, other) for name, tree in modules().items() for other in own(tree) if floor(other) > floor(name)}
    assert above == set()


def test_networks_and_solvers_know_nothing_of_ranks() -> None:
    for name, tree in modules().items():
        if name.startswith(("model.", "diffusion.")):
            assert {other for other in own(tree) if other.startswith(("parallel", "io", "data"))} == set()


def test_every_room_is_on_the_plan() -> None:
    plan = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    missing = [name for name in modules() if f"{name.split('.')[-1]}.py" not in plan]
    assert missing == []


@pytest.mark.parametrize("package", ["config", "decomposition", "random", "model.two_level", "diffusion.solvers"])
def test_lower_floors_work_without_mpi4py(package: str) -> None:
    code = f"import sys; sys.modules['mpi4py'] = None; import ddpatch.{package}"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
