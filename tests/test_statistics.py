"""Increments, gradients and seams against analytic fields, hand-made fields and fields of independent patches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpatch.statistics import gradients, increments, seams
from ddpatch.statistics.comparison import halves, resolved_shells


def noise(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(7).standard_normal(shape))


def white_lines(lines: int, points: int, length: float) -> Tensor:
    """Homogeneous correlated Gaussian lines ``[1, line, point]``: white noise smoothed on the circle."""
    modes = torch.fft.rfft(noise(1, lines, points))
    k = torch.arange(modes.shape[-1])
    return torch.fft.irfft(modes * torch.exp(-((k * length / points) ** 2)), n=points)


def test_separations_reach_half_the_grid() -> None:
    assert increments.separations(33) == (1, 2, 3, 4, 6, 8, 12, 16)
    assert increments.separations(4) == (1, 2)


def test_structure_functions_of_a_sine() -> None:
    points, amplitude, wave = 32, 1.5, 3
    x = 2 * math.pi * torch.arange(points, dtype=torch.float64) / points
    line = amplitude * torch.sin(wave * x)[None, None]
    distances = increments.separations(points)
    sums = increments.increment_sums(line, distances, periodic=True)
    size = 2 * amplitude * torch.tensor([math.sin(math.pi * wave * r / points) for r in distances], dtype=torch.float64)
    torch.testing.assert_close(sums[:, 0] / sums[:, 4], size**2 / 2)  # an increment is a cosine of amplitude ``size``
    torch.testing.assert_close(sums[:, 2] / sums[:, 4], 3 * size**4 / 8)
    assert float(sums[:, 3].abs().max()) < 1e-10
    assert sums[:, 4].tolist() == [points] * len(distances)


def test_increments_stop_at_walls() -> None:
    line = torch.arange(6, dtype=torch.float64)[None, None] ** 2
    sums = increments.increment_sums(line, (1, 4), periodic=False)
    assert sums[0].tolist() == [sum((2 * i + 1) ** p for i in range(5)) for p in (2, 3, 4, 3)] + [5]
    assert sums[1].tolist() == [16**2 + 24**2, 16**3 + 24**3, 16**4 + 24**4, 16**3 + 24**3, 2]


def test_flatness_of_gaussian_noise_is_three() -> None:
    sums = increments.increment_sums(noise(1, 400, 500), (1, 5), periodic=True).T
    flatness = sums[2] * sums[4] / sums[0] ** 2
    assert flatness.numpy() == pytest.approx(3.0, abs=0.06)
    skewness = (sums[3] / sums[4]) / (sums[0] / sums[4]) ** 1.5
    assert skewness.numpy() == pytest.approx(0.0, abs=0.03)


def test_histogram_is_the_gaussian_density_and_loses_nothing() -> None:
    counts = increments.histogram(torch.cat([2 * noise(200000), torch.tensor([1e9, -1e9])]), 2.0)
    width = float(increments.bin_centres()[1] - increments.bin_centres()[0])
    density = counts / counts.sum() / width
    gaussian = torch.exp(-(increments.bin_centres() ** 2) / 2) / math.sqrt(2 * math.pi)
    assert float((density - gaussian).abs().max()) < 0.01
    assert float(counts.sum()) == 200002 and counts[0] == 1 and counts[-1] == 1
    assert float(increments.bin_centres()[60]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("ndim", [2, 3])
def test_divergence_and_vorticity_of_a_vortex_and_a_source(ndim: int) -> None:
    points, step = 12, 2 * math.pi / 12
    phase = [torch.arange(points, dtype=torch.float64) * step] * ndim
    *_, y, x = torch.meshgrid(*phase, indexing="ij")
    vortex = torch.stack([torch.sin(y), -torch.sin(x), *[torch.zeros_like(x)] * (ndim - 2)])
    source = torch.stack([torch.cos(x) * torch.sin(y), torch.sin(x) * torch.cos(y), *[torch.zeros_like(x)] * (ndim - 2)])
    damped = math.sin(step) / step  # the central difference of a mode of wave number 1
    ringed = [torch.cat([field[:, -1:], field, field[:, :1]], 1) for field in (vortex, source)]
    slopes = [gradients.gradient(field, (step,) * ndim, (True,) * ndim) for field in ringed]
    swirl = gradients.vorticity(slopes[0])
    torch.testing.assert_close(swirl[-1], -damped * (torch.cos(x) + torch.cos(y)))
    assert len(swirl) == (1 if ndim == 2 else 3) and float(swirl[:-1].abs().sum()) < 1e-12
    ratios = [(sums[0] / sums[1]).sqrt() for sums in map(gradients.gradient_sums, slopes)]
    assert float(ratios[0]) < 1e-12 and float(ratios[1]) == pytest.approx(1, abs=1e-12)


def test_gradient_is_taken_inside_walls_only() -> None:
    y, x = torch.meshgrid(torch.arange(5.0), torch.arange(6.0), indexing="ij")
    slopes = gradients.gradient((3 * y + 5 * x)[None].double(), (0.5, 1.0), (False, False))
    assert slopes.shape == (2, 1, 3, 4)
    assert slopes[0].unique().tolist() == [6.0] and slopes[1].unique().tolist() == [5.0]


def test_every_component_of_the_vorticity_has_its_sign() -> None:
    z, y, x = torch.meshgrid(*[torch.arange(4.0).double()] * 3, indexing="ij")
    field = torch.stack([2 * y + 3 * z, 5 * x + 7 * z, 11 * x + 13 * y])
    swirl = gradients.vorticity(gradients.gradient(field, (1.0,) * 3, (False,) * 3))
    assert swirl.flatten(1).unique(dim=1).T.tolist() == [[13 - 7, 3 - 11, 5 - 2]]


def test_seam_ratio_of_a_hand_made_line() -> None:
    line = torch.tensor([0.0, 1.0, 3.0, 4.0, 4.0, 5.0]).double()[None, None]  # patches of three points
    jumps = seams.jump_sums(line, 3, periodic=True)
    assert jumps[0].tolist() == [[1 + 0, 2], [4 + 1, 2], [1 + 25, 2]]  # 3→4 and 5→0 straddle the borders
    assert float(seams.seam_ratios(jumps)[0]) == pytest.approx(13.0 / 1.5)
    # second differences at points 0..5: 6, 1, -1, -1, 1, -6; points 1 and 4 are inside
    assert jumps[1].tolist() == [[36 + 1, 2], [1 + 1, 2], [1 + 36, 2]]
    assert float(seams.seam_ratios(jumps)[1]) == pytest.approx(18.5)
    walled = seams.jump_sums(line, 3, periodic=False)
    assert walled[0].tolist() == [[1 + 0, 2], [4 + 1, 2], [1, 1]]
    assert walled[1].tolist() == [[1, 1], [1 + 1, 2], [1, 1]]


def test_seam_ratio_of_homogeneous_and_of_independent_patches() -> None:
    smooth = white_lines(4000, 64, 8.0)
    patchwise = torch.cat([white_lines(4000, 64, 8.0)[..., :16], -white_lines(8000, 64, 8.0)[:, 4000:, 16:32]], -1)
    one, many = (seams.seam_ratios(seams.jump_sums(lines, 16, periodic=True)) for lines in (smooth, patchwise))
    assert one.numpy() == pytest.approx(1.0, abs=0.03)
    assert float(many[0]) > 5 and float(many[1]) > float(many[0])


def test_pairs_within_and_across_patches() -> None:
    distances = (1, 2, 3, 8)
    sums = seams.pair_sums(white_lines(4000, 64, 12.0), 16, distances, periodic=True)
    correlation = seams.pearson(sums)[:, :, 0]
    assert sums[:, :, 0, 5].tolist() == [[4000 * 4 * (16 - r), 4000 * 4 * r] for r in distances]
    torch.testing.assert_close(correlation[:, 0], correlation[:, 1], rtol=0, atol=0.03)
    assert float(correlation[0, 0]) > 0.9
    independent = torch.cat([white_lines(n * 4000, 64, 12.0)[:, -4000:, :16] for n in (1, 2, 3, 4)], -1)
    correlation = seams.pearson(seams.pair_sums(independent, 16, distances, periodic=True))[:, :, 0]
    assert float(correlation[0, 0]) > 0.9
    assert float(correlation[:, 1].abs().max()) < 0.06


def test_patch_sums_add_up_over_pieces_of_rows() -> None:
    field = noise(2, 6, 8, 4)
    parts = [seams.patch_sums(field[:, a:b], a, (3, 4, 2), (2, 2, 2)) for a, b in ((0, 2), (2, 5), (5, 6))]
    expected = field.reshape(2, 2, 3, 2, 4, 2, 2).sum((2, 4, 6))
    torch.testing.assert_close(sum(parts, torch.zeros(())), expected)


def test_correlation_of_patch_means() -> None:
    sums = seams.neighbour_sums(noise(1, 300, 200), (True, True))
    assert seams.pearson(sums).numpy() == pytest.approx(0, abs=0.02)
    means = torch.arange(300.0).double()[None, :, None] + noise(1, 300, 1)
    along, single = seams.pearson(seams.neighbour_sums(means, (False, True)))[:, 0]
    assert float(along) > 0.99 and math.isnan(float(single))


@pytest.mark.parametrize(("count", "ways"), [(1, 0), (2, 1), (3, 1), (4, 3), (16, 35)])
def test_halves_are_disjoint_and_use_every_sample(count: int, ways: int) -> None:
    found = list(halves(count))
    assert len(found) == ways and len({tuple(a) for a, _ in found}) == ways
    for a, b in found:
        assert sorted(a + b) == list(range(count)) and abs(len(a) - len(b)) <= 1


def test_resolved_range() -> None:
    energy = np.array([9.0, 1.0, 1e-3, 1e-6, 1e-10, 1e-11])
    assert resolved_shells(energy, nyquist=5, k_max=None) == 3
    assert resolved_shells(energy, nyquist=2, k_max=None) == 2
    assert resolved_shells(energy, nyquist=5, k_max=4) == 4
