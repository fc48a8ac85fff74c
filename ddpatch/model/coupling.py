"""What the network is given to reach other patches, and what stands for it where there are none."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch.nn.functional as F
from torch import Tensor

from ddpatch.decomposition import Decomposition

Heard = TypeVar("Heard")


class Arrival(NamedTuple):
    """Windows whose halos are on their way.

    Attributes:
        windows: Shape ``[sample, local patch, channel, *(patch_shape + 2 δ)]``, filled in place.
        ready: Global numbers of the own patches whose halos are there already.
        wait: Returns when those of all others are; to be called once. Collective.
    """

    windows: Tensor
    ready: Collection[int]
    wait: Callable[[], None]

    def in_order(self, groups: Sequence[Collection[int]]) -> Iterator[int]:
        """Numbers of all groups of patches: those that are ready, then, after waiting, all others. Collective."""
        early = [all(patch in self.ready for patch in group) for group in groups]
        yield from (i for i, ready in enumerate(early) if ready)
        self.wait()
        yield from (i for i, ready in enumerate(early) if not ready)


class Coupling(Protocol):
    """What the network is given to reach other patches. See :class:`ddpatch.parallel.collectives.Exchange`."""

    @property
    def decomposition(self) -> Decomposition:
        """The grid and its patches."""

    @property
    def patches(self) -> Sequence[int]:
        """Global numbers of the own patches."""

    def gather(self, tokens: Tensor) -> Tensor:
        """``[sample, local patch, ...]`` to ``[sample, patch, ...]``. Collective."""

    def start_gather(self, tokens: Tensor) -> Callable[[], Tensor]:
        """What waits for a gather that begins. Collective."""

    def start_halo(self, patches: Tensor) -> Arrival:
        """Windows of ``patch_shape + 2 δ`` that begin to arrive, from patches ``[sample, local patch, channel, *patch_shape]``.
        Collective.
        """


class OwnPatch:
    """The coupling of a patch that is a field of its own: nobody to gather from, and nothing beyond the patch.

    Arguments:
        patch_shape: Points of the patch.
        halo: Width δ of the windows.
    """

    def __init__(self, patch_shape: Sequence[int], halo: int) -> None:
        shape = tuple(patch_shape)
        self.decomposition, self.patches = Decomposition(shape, shape, 1, (False,) * len(shape)), [0]
        self._pad = [halo] * 2 * len(shape)

    def gather(self, tokens: Tensor) -> Tensor:
        """The tokens themselves."""
        return tokens

    def start_gather(self, tokens: Tensor) -> Callable[[], Tensor]:
        """They are there."""
        return lambda: tokens

    def start_halo(self, patches: Tensor) -> Arrival:
        """Patches framed with zeros."""
        return Arrival(F.pad(patches, self._pad), self.patches, lambda: None)


class Lag(Generic[Heard]):
    """Lets the coarse level speak of the evaluation before: the tokens of one are on their way until the next needs them.

    The first evaluation speaks of itself. The one after the last is never made: :meth:`end` takes its place.
    """

    def __init__(self) -> None:
        self._next: Callable[[], Heard] | None = None

    def __call__(self, wait: Callable[[], Tensor], couple: Callable[[Tensor], Heard]) -> Heard:
        """The message of the evaluation before, from what waits for the tokens of this one, and what makes a message of them.
        Collective.
        """
        if self._next is None:
            message = couple(wait())
            self._next = lambda: message
        else:
            message, self._next = self._next(), lambda: couple(wait())
        return message

    def end(self) -> None:
        """Receive what is still on its way. Collective."""
        if self._next is not None:
            self._next()
            self._next = None
