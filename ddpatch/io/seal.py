"""The last line of a file: the SHA-256 of all that stands before it, so that not a bit changes or is missing unnoticed."""

from __future__ import annotations

import hashlib
from pathlib import Path

MARK = b"\nsha256 "
DIGITS = 64
LENGTH = len(MARK) + DIGITS


def seal(path: Path) -> None:
    """Append the seal to a complete file."""
    digest = _digest(path, path.stat().st_size)
    with path.open("ab") as file:
        file.write(MARK + digest.encode())


def read_seal(path: Path) -> str:
    """The digest that a file ends with, in hexadecimal, not compared with its content.

    Raises:
        ValueError: if the file does not end with a seal.
    """
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LENGTH))
        end = file.read()
    if len(end) < LENGTH or not end.startswith(MARK):
        raise ValueError("its checksum at the end is missing")
    return end[len(MARK) :].decode("ascii", "replace")


def check_seal(path: Path) -> None:
    """Compare a file with its seal.

    Raises:
        ValueError: if they differ, or there is none.
    """
    expected = read_seal(path)
    if _digest(path, path.stat().st_size - LENGTH) != expected:
        raise ValueError("its checksum is wrong")


def _digest(path: Path, length: int) -> str:
    """The SHA-256 of the first bytes of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while length > 0 and (piece := file.read(min(length, 2**22))):
            digest.update(piece)
            length -= len(piece)
    return digest.hexdigest()
