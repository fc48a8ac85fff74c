"""Randomness keyed by what it is for, never by where it is drawn.

Every draw is named by ``(seed, stream, *identity)``, where the identity is made of global indices (sample, step, patch). The
key is hashed to 128 bits and becomes the key of a counter-based generator (Philox, Salmon et al. 2011), so that any rank can
draw any number of any stream without communication, and the number of ranks changes nothing.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Stream(IntEnum):
    """What a draw is for. The values are part of the file format of reproducibility: append, never renumber."""

    INIT = 0
    NOISE = 1
    SIGMA = 2
    ORDER = 3
    SHIFT = 4
    SAMPLE = 5
    SIMULATION = 6
    TILING = 7


def generator(seed: int, stream: Stream, *identity: int) -> np.random.Generator:
    """The generator of one key. Same key, same numbers, on any machine and rank."""
    packed = struct.pack(f"<{2 + len(identity)}q", seed, int(stream), *identity)
    key = np.frombuffer(hashlib.blake2b(packed, digest_size=16).digest(), dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def patch_noise(
    shape: Sequence[int], seed: int, stream: Stream, samples: Sequence[int], step: int, patches: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """White unit noise of some patches of some samples, with shape ``[sample, patch, *shape]``.

    The numbers are drawn in single precision on the CPU whatever ``dtype`` is, so that runs in different precisions see the
    same noise, by as many threads as torch has.

    Arguments:
        shape: Shape of one patch, ``(channel, *patch_shape)``.
        seed, stream, step: Parts of the key that all patches share.
        samples: Global sample numbers.
        patches: Global patch numbers.
        dtype: Type of the result.
    """
    noise = np.empty((len(samples), len(patches), *shape), dtype=np.float32)

    def draw(place: tuple[int, int]) -> None:
        name = samples[place[0]], step, patches[place[1]]
        generator(seed, stream, *name).standard_normal(out=noise[place], dtype=np.float32)

    places = list(np.ndindex(len(samples), len(patches)))
    with ThreadPoolExecutor(min(torch.get_num_threads(), len(places))) as threads:
        list(threads.map(draw, places))
    return torch.from_numpy(noise).to(dtype)
