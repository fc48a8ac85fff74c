"""The ways to couple patches: the default, its parts alone, what others do, and controls."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pathways:
    """What a patch is told of the others.

    Arguments:
        halo: The stem sees ``model.halo`` points around the patch.
        coarse: What couples the tokens of all patches: ``transformer``, ``convolution``, or nothing.
        means: Tokens carry block means of the field besides latent features.
        fine: The coarse level enters the finest decoder stage besides the bottleneck.
        alone: Every patch is a field of its own: the same network, beyond the patch there is nothing.
        whole: The patch is the whole grid, and the convolutions close on themselves: with tokens, or, as a U-Net, without.
    """

    halo: bool = True
    coarse: str | None = "transformer"
    means: bool = True
    fine: bool = True
    alone: bool = False
    whole: bool = False


COUPLINGS = {
    "two-level": Pathways(),
    "none": Pathways(halo=False, coarse=None, means=False, fine=False),
    "self-only": Pathways(alone=True),
    "additive": Pathways(halo=False, means=False, fine=False),
    "convolutional": Pathways(halo=False, coarse="convolution", means=False, fine=False),
    "halo": Pathways(coarse=None, means=False, fine=False),
    "tokens": Pathways(halo=False),
    "full-domain": Pathways(whole=True),
    "u-net": Pathways(coarse=None, means=False, fine=False, whole=True),
}
