from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpatch.decomposition import Decomposition, block_range
from ddpatch.errors import UserError


@st.composite
def decompositions(draw: st.DrawFn) -> Decomposition:
    ndim = draw(st.sampled_from([2, 3]))
    patches = draw(st.lists(st.integers(1, 4), min_size=ndim, max_size=ndim))
    patch = draw(st.lists(st.integers(1, 3), min_size=ndim, max_size=ndim))
    size = draw(st.integers(1, int(np.prod(patches))))
    periodic = draw(st.lists(st.booleans(), min_size=ndim, max_size=ndim))
    return Decomposition(tuple(n * p for n, p in zip(patches, patch, strict=True)), tuple(patch), size, tuple(periodic))


@given(decompositions())
def test_patches_cover_the_grid_once(decomposition: Decomposition) -> None:
    hits = np.zeros(decomposition.grid_shape, int)
    for patch in range(decomposition.num_patches):
        hits[decomposition.slices(patch)] += 1
    assert (hits == 1).all()


@given(decompositions())
def test_ranks_share_the_patches_evenly(decomposition: Decomposition) -> None:
    ranges = [decomposition.local_patches(rank) for rank in range(decomposition.size)]
    assert [p for r in ranges for p in r] == list(range(decomposition.num_patches))
    assert min(decomposition.counts) >= 1
    assert max(decomposition.counts) - min(decomposition.counts) <= 1
    assert all(decomposition.owner(p) == rank for rank, r in enumerate(ranges) for p in r)


@given(decompositions())
def test_neighbours_are_mutual_and_end_at_walls(decomposition: Decomposition) -> None:
    for patch in range(decomposition.num_patches):
        place = np.array(decomposition.position(patch))
        for offset in decomposition.offsets:
            other = decomposition.neighbour(patch, offset)
            beyond = place + offset
            outside = (beyond < 0) | (beyond >= decomposition.patch_grid)
            assert (other is None) == bool((outside & ~np.array(decomposition.periodic)).any())
            if other is not None:
                assert decomposition.neighbour(other, tuple(-o for o in offset)) == patch


def test_block_range_gives_the_first_ranks_one_more() -> None:
    assert [len(block_range(11, 4, rank)) for rank in range(4)] == [3, 3, 3, 2]


def test_a_patch_that_does_not_divide_the_grid_is_refused() -> None:
    with pytest.raises(UserError, match=r"domain.patch: \[16, 12\] does not divide domain.grid \[32, 32\]"):
        Decomposition((32, 32), (16, 12))


def test_more_ranks_than_patches_are_refused_with_both_numbers() -> None:
    with pytest.raises(UserError, match="5 ranks for 4 patches"):
        Decomposition((32, 32), (16, 16), 5)
