"""Small tables that are made once and kept on the device where they are used, which would wait for a copy."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, ParamSpec, TypeVar, cast

Given = ParamSpec("Given")
Table = TypeVar("Table")
KEPT: list[Any] = []


def keep(make: Callable[Given, Table]) -> Callable[Given, Table]:
    """Let a function make a table once for the same arguments, which name the device."""
    kept = cache(make)
    KEPT.append(kept)
    return cast(Callable[Given, Table], kept)


def forget() -> None:
    """Let all tables be made anew."""
    for kept in KEPT:
        kept.cache_clear()
