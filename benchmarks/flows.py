"""The flows of the turbulence benchmarks: data, patches, network and budget, and the schemes that are compared on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMES = {  # name: (coupling of the network, how it is sampled)
    "full-domain U-Net": ("u-net", "fixed"),
    "independent patches": ("none", "fixed"),
    "overlapping windows": ("none", "overlap"),
    "moving tiling": ("none", "moving"),
    "halo": ("halo", "fixed"),
    "tokens": ("tokens", "fixed"),
    "halo and tokens": ("two-level", "fixed"),
    "full domain, same network": ("full-domain", "fixed"),
    "halo, moving tiling": ("halo", "moving"),
    "tokens, moving tiling": ("tokens", "moving"),
    "halo and tokens, moving tiling": ("two-level", "moving"),
    "halo and tokens, lagged": ("two-level", "lagged"),
}
MORE = tuple(scheme for scheme in SCHEMES if "," in scheme)


@dataclass(frozen=True)
class Flow:
    """Data, patches, network and budget.

    ``samples``: of training, of the reference, of calibration, and drawn; ``together``: those drawn at a time.
    ``uncoupled``: channels that give a network without transformer as many parameters. ``viscosity``: ``None`` takes what the
    grid resolves.
    """

    kind: str
    grid: int
    patch: tuple[int, ...]
    samples: tuple[int, int, int, int]
    together: int
    model: dict[str, Any]
    uncoupled: list[int]
    train: dict[str, Any]
    viscosity: float | None = None


NARROW = {"channels": [16, 32, 64], "halo": 4, "token_channels": 16, "coarse_width": 64, "coarse_layers": 3}
WIDE = {"channels": [64, 128, 256], "halo": 4, "token_channels": 32, "coarse_width": 256, "coarse_layers": 6}
SMALL = {
    "kolmogorov": Flow(
        "kolmogorov",
        64,
        (16, 16),
        (256, 256, 128, 192),
        16,
        NARROW,
        [16, 32, 88],
        {"steps": 1200, "batch": 4, "ema": 600.0},
        2e-3,
    ),  # the viscosity that 128² points resolve
    "isotropic": Flow(
        "isotropic", 32, (16,) * 3, (64, 64, 16, 64), 2, NARROW, [16, 32, 74], {"steps": 360, "batch": 2, "ema": 100.0}
    ),
}
FULL = {
    "kolmogorov": Flow(
        "kolmogorov", 128, (32, 32), (1024, 256, 256, 256), 16, WIDE, [64, 128, 424], {"steps": 4000, "batch": 16, "ema": 4000.0}
    ),
    "isotropic": Flow(
        "isotropic", 64, (32,) * 3, (256, 64, 32, 64), 4, WIDE, [64, 128, 328], {"steps": 4000, "batch": 4, "ema": 1000.0}
    ),
}


def samples_of(scheme: str, folder: Path) -> Path:
    """The file of a scheme's samples."""
    return folder / f"{scheme.replace(',', '').replace(' ', '-')}.h5"
