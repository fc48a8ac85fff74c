"""The verb ``evaluate`` as a whole: figures that tell samples from the reference, files, refusals, and the page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpatch.data.fields import FieldFile
from ddpatch.errors import UserError
from ddpatch.evaluate import comparable, compare_fields, evaluate, make_plan
from ddpatch.io.volume import VolumeHeader, write_volume
from ddpatch.parallel.comm import Communicator
from ddpatch.statistics.curves import curves
from ddpatch.statistics.measure import measure
from ddpatch.statistics.report import FIGURES, PLOTS

PATCH = (8, 8)


def smooth(samples: int, grid: tuple[int, ...], seed: int, channels: int = 1, steepness: float = 3.0) -> np.ndarray:
    """Homogeneous periodic Gaussian fields ``[sample, channel, *grid]`` with a steep spectrum."""
    axes = tuple(range(2, 2 + len(grid)))
    modes = np.fft.fftn(np.random.default_rng(seed).standard_normal((samples, channels, *grid)), axes=axes)
    square = sum(k**2 for k in np.meshgrid(*[np.fft.fftfreq(n, 1 / n) for n in grid], indexing="ij"))
    fields: np.ndarray = np.fft.ifftn(modes * (1 + square / 4) ** (-steepness / 2), axes=axes).real
    return fields


def independent_patches(samples: int, seed: int) -> np.ndarray:
    """16 × 16 fields whose 8 × 8 patches come from different smooth fields."""
    sources = smooth(4 * samples, (16, 16), seed).reshape(samples, 4, 1, 16, 16)
    rows = [np.concatenate([sources[:, 2 * i, :, :8, :8], sources[:, 2 * i + 1, :, :8, :8]], axis=-1) for i in (0, 1)]
    return np.concatenate(rows, axis=-2)


def write(path: Path, fields: np.ndarray, spacing: float = 1.0, **attributes: Any) -> Path:
    ndim = fields.ndim - 2
    names = tuple(f"c{i}" for i in range(fields.shape[1]))
    write_volume(
        path, VolumeHeader(len(fields), names, fields.shape[2:], (spacing,) * ndim, (True,) * ndim, "float64", attributes), fields
    )
    return path


def headline(samples: Path, reference: Path, comm: Communicator, patch: tuple[int, ...] | None = None) -> dict[str, Any]:
    """The figures, without a report."""
    with FieldFile(samples) as generated, FieldFile(reference) as source:
        return compare_fields(generated, comparable(generated, source), comm, patch).headline()


class Page(HTMLParser):
    """What a page shows and what it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if tag == "img" and key == "src":
                self.images.append(value or "")
            elif key in ("src", "href"):
                self.references.append(value or "")


def test_samples_of_the_same_kind_reach_the_floor_and_independent_patches_do_not(tmp_path: Path, comm: Communicator) -> None:
    reference = write(tmp_path / "reference.h5", smooth(48, (16, 16), 1))
    good = write(tmp_path / "good.h5", smooth(48, (16, 16), 2), patch_shape=np.array(PATCH))
    bad = write(tmp_path / "bad.h5", independent_patches(48, 3))
    fine = headline(good, reference, comm)
    torn = headline(bad, reference, comm, PATCH)
    for key in ("spectrum", "structure_function", "across_correlation"):
        assert fine[key]["ratio"] < 2.5 and torn[key]["ratio"] > 4, key
    assert fine["seam_ratio"]["value"] == pytest.approx(1, abs=0.1) and torn["seam_ratio"]["value"] > 2
    assert torn["seam_ratio_2"]["value"] > torn["seam_ratio"]["value"]
    assert abs(torn["patch_correlation"]["value"]) < 0.15 < abs(fine["patch_correlation"]["value"])
    assert "divergence" not in fine


def test_a_file_against_itself_has_no_distance(tmp_path: Path, comm: Communicator) -> None:
    path = write(tmp_path / "u.h5", smooth(4, (8, 6, 10), 1, channels=3), patch_shape=np.array([4, 3, 5]))
    figures = headline(path, path, comm)
    assert set(figures) == set(FIGURES)
    for key, entry in figures.items():
        assert entry.get("distance", entry["value"]) == 0 and entry["floor"] > 0 and entry["ratio"] == 0, key
    assert figures["divergence"]["value"] > 0.3  # independent components


def test_files_of_the_report(tmp_path: Path, comm: Communicator) -> None:
    path = write(tmp_path / "u.h5", smooth(2, (16, 16), 1), patch_shape=np.array(PATCH))
    metrics = evaluate(path, path, tmp_path / "out", comm)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    names = {item.name for item in (tmp_path / "out").iterdir()}
    assert names == {"metrics.json", "report.html"} | {f"{plot}.png" for plot in PLOTS}
    assert (tmp_path / "out" / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"metrics\.json: exists already"):
        evaluate(path, path, tmp_path / "out", comm)
    evaluate(path, path, tmp_path / "out", comm, overwrite=True, limit=1)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["setting"]["reference"]["samples"] == 1


def test_the_page_is_self_contained_and_escapes(tmp_path: Path, comm: Communicator) -> None:
    path = write(
        tmp_path / "<script>alert(1)</script>&.h5".replace("/", "_"), smooth(2, (16, 16), 1), patch_shape=np.array(PATCH)
    )
    evaluate(path, path, tmp_path / "out", comm)
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.images) == len(PLOTS) and all(image.startswith("data:image/png;base64,") for image in page.images)
    assert not page.references and "script" not in page.tags and "link" not in page.tags
    assert "&lt;script&gt;" in text and not re.search(r"https?://", text)
    assert 'name="viewport"' in text


def test_one_reference_sample_has_no_floor_and_the_page_says_so(tmp_path: Path, comm: Communicator) -> None:
    path = write(tmp_path / "u.h5", smooth(1, (16, 16), 1))
    metrics = evaluate(path, path, tmp_path / "out", comm)
    assert all(entry["floor"] is None and entry["ratio"] is None for entry in metrics["headline"].values())
    assert "seam_ratio" not in metrics["headline"]
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "single sample, so there is no noise floor" in text and "No patch shape is known" in text


def test_samples_on_a_larger_grid_and_on_crops(tmp_path: Path, comm: Communicator) -> None:
    fields = smooth(6, (32, 32), 1)
    small = write(tmp_path / "small.h5", fields)
    tiled = write(tmp_path / "tiled.h5", np.tile(fields, (1, 1, 2, 2)))
    larger = headline(tiled, small, comm, (16, 16))
    for key in ("spectrum", "structure_function", "flatness", "increment_pdf", "deviation"):
        assert larger[key].get("distance", larger[key]["value"]) == pytest.approx(0, abs=1e-9), key
    metrics = evaluate(small, tiled, tmp_path / "crops", comm)
    assert metrics["setting"]["reference"]["samples"] == 24 and metrics["setting"]["periodic"] == [False, False]
    assert metrics["headline"]["spectrum"]["value"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("fields", "spacing", "patch", "message"),
    [
        (smooth(1, (16, 16), 1, channels=2), 1.0, None, r"\[2, 16, 16\] cannot be compared with \[1, 16, 16\]"),
        (smooth(1, (8, 8, 8), 1), 1.0, None, r"\[1, 8, 8, 8\] cannot be compared"),
        (smooth(1, (16, 16), 1), 0.5, None, "spacing"),
        (smooth(1, (8, 32), 1), 1.0, None, r"grid \[8, 32\] is larger than \[16, 16\]"),
        (smooth(1, (16, 16), 1), 1.0, (5, 8), r"patch: \[5, 8\] does not divide"),
    ],
    ids=["channels", "axes", "spacing", "grid", "patch"],
)
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, comm: Communicator, fields: np.ndarray, spacing: float, patch: tuple[int, ...] | None, message: str
) -> None:
    reference = write(tmp_path / "reference.h5", smooth(1, (16, 16), 1))
    with pytest.raises(UserError, match=message):
        headline(write(tmp_path / "u.h5", fields, spacing), reference, comm, patch)


def test_real_turbulence_is_solenoidal_and_intermittent(comm: Communicator, shared_data: Path) -> None:
    with FieldFile(shared_data / "hit_fluidsim_128.h5", "velocity") as file:
        plan = make_plan(file, file, (64, 64, 64))
        turbulence = curves(measure(file, [0], plan, comm), plan)
    assert turbulence.spectral_divergence < 3e-3
    assert turbulence.skewness[0] == pytest.approx(-0.49, abs=0.08) and turbulence.flatness[0] > 3.5
