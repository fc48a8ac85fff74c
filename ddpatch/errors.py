"""The user's mistakes, as opposed to ours."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user gave us: one line that names the key or file, the value, and what was expected.

    The command line prints the line without a traceback and exits with code 2.
    """


class Left(Exception):
    """The job leaves before its work is done, which is saved: to be started again, by the batch script too (exit code 75)."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint ``", did you mean 'x'?"`` for a misspelt name, or the empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean '{close[0]}'?" if close else ""
