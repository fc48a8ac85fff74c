"""What ``ddpatch calibrate`` keeps in the folder of a run, and for what it is."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ddpatch.diffusion.level_scale import EXACT, LevelScale
from ddpatch.errors import UserError
from ddpatch.io.volume import replace_when_complete

CALIBRATION = "calibration.json"
SCALE = "level_scale"  # in that file: values and levels of λ(σ), once a number; "noise_scale" was a scale of the predicted noise
NAMES = {"steps": "number of steps", "levels": "choice of noise levels", "lagged": "value of sample.lagged"}


def keep(path: Path, found: Mapping[str, Any]) -> None:
    """Write a calibration, in place of an earlier one."""
    found = {**found, SCALE: asdict(found[SCALE])}
    with replace_when_complete(path, overwrite=True) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")


def read_calibration(path: Path) -> dict[str, Any]:
    """What was kept, nothing where there was no calibration.

    Raises:
        UserError: if the file is damaged.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        return {"lagged": False, **found, SCALE: _as_scale(found[SCALE])}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not what ddpatch calibrate writes; run it again, or remove the file") from None


def _as_scale(kept: Any) -> LevelScale:
    """What was kept of a scale; a number stands for the same at all levels."""
    if not isinstance(kept, Mapping):
        return LevelScale((float(kept),))
    values, levels = (tuple(map(float, kept[key])) for key in ("values", "levels"))
    if not len(values) == len(levels) > 0 or levels[0] <= 0 or sorted(levels) != list(levels):
        raise ValueError("as many values as ascending levels")
    return LevelScale(values, levels)


def scale_for(setting: Mapping[str, Any], path: Path) -> LevelScale:
    """The scale of noise levels that was found for a setting; 1, and a warning, where it was found for another.

    Arguments:
        setting: What has to be the same, by the names in the file.
        path: Of the file; 1 without a word where there is none.

    Raises:
        UserError: if the file is damaged.
    """
    found = read_calibration(path)
    others = [key for key, value in setting.items() if found.get(key) != value]
    if found and others:
        told = f"it is of another {NAMES.get(others[0], others[0])}; run ddpatch calibrate again"
        print(f"ddpatch: warning: {path}: not used, for {told}", file=sys.stderr, flush=True)
    return EXACT if others else found[SCALE]
