from __future__ import annotations

import pytest
import torch

from ddpatch.random import Stream, generator, patch_noise


def test_noise_of_a_patch_does_not_depend_on_what_is_drawn_with_it() -> None:
    together = patch_noise((2, 4, 4), 7, Stream.NOISE, [3, 5], 0, range(6), torch.float32)
    alone = patch_noise((2, 4, 4), 7, Stream.NOISE, [5], 0, [4], torch.float32)
    assert torch.equal(together[1, 4], alone[0, 0])


def test_threads_draw_the_same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    for threads in (1, 3, 99):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        drawn.append(patch_noise((2, 4, 4), 7, Stream.NOISE, [3, 5], 0, range(6), torch.float32))
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_every_part_of_the_key_matters() -> None:
    keys = [(0, Stream.NOISE, 1, 2), (1, Stream.NOISE, 1, 2), (0, Stream.SAMPLE, 1, 2), (0, Stream.NOISE, 2, 1)]
    draws = {int(generator(seed, stream, *place).integers(2**62)) for seed, stream, *place in keys}
    assert len(draws) == len(keys)


def test_noise_is_white_and_independent_between_patches() -> None:
    noise = patch_noise((1, 32, 32), 0, Stream.NOISE, range(16), 0, range(16), torch.float64).flatten(0, 1).flatten(1)
    points = noise.shape[1]
    correlation = noise @ noise.T / points
    off = correlation - torch.diag(correlation.diagonal())
    assert abs(float(noise.mean())) < 5 / noise.numel() ** 0.5
    assert abs(float(noise.square().mean()) - 1) < 5 * (2 / noise.numel()) ** 0.5
    assert float(off.abs().max()) < 6 / points**0.5


def test_single_and_double_precision_see_the_same_noise() -> None:
    single, double = (patch_noise((8,), 0, Stream.NOISE, [0], 0, [0], dtype) for dtype in (torch.float32, torch.float64))
    assert torch.equal(single.to(torch.float64), double)
