"""The ranks as a grid: replicas, which train on different samples, of domain groups, whose ranks share every sample."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ddpatch.errors import UserError
from ddpatch.parallel.comm import Communicator


@dataclass(frozen=True)
class ProcessGrid:
    """Where this rank stands.

    Attributes:
        world: All ranks: gradients, logs and checkpoints.
        domain: The ranks that share this rank's samples, neighbours in the world: halos and tokens.
        replicas: Number of domain groups.
        replica: Number of this rank's.
    """

    world: Communicator
    domain: Communicator
    replicas: int = 1
    replica: int = 0

    @property
    def seconds(self) -> float:
        """Wall time that this rank spent in communication."""
        return self.world.seconds + (self.domain.seconds if self.domain is not self.world else 0.0)

    @property
    def calls(self) -> Counter[str]:
        """Calls of this rank so far, by kind of communication."""
        return self.world.calls + (self.domain.calls if self.domain is not self.world else Counter())

    @property
    def bytes(self) -> Counter[str]:
        """Bytes that this rank has sent so far, by kind of communication."""
        return self.world.bytes + (self.domain.bytes if self.domain is not self.world else Counter())


def make_grid(world: Communicator, replicas: int) -> ProcessGrid:
    """Split the ranks into domain groups of equal size. Collective."""
    if replicas == 1:
        return ProcessGrid(world, world)
    replica = world.rank // (world.size // replicas)
    return ProcessGrid(world, world.split(replica), replicas, replica)


def choose_replicas(size: int, patches: int, batch: int, wanted: int | None = None) -> int:
    """The number of replicas: as wanted, or the smallest that leaves every rank of a domain group a patch.

    Arguments:
        size: Number of ranks.
        patches: Of the grid: a domain group has at most as many ranks.
        batch: Samples per step: there are at most as many replicas.
        wanted: ``parallel.replicas``.

    Raises:
        UserError: if there is no such number, or the wanted one does not fit.
    """
    fitting = [r for r in range(1, min(size, batch) + 1) if size % r == 0 and size // r <= patches]
    if wanted is None and fitting:
        return fitting[0]
    if wanted in fitting:
        assert wanted is not None
        return wanted
    limits = f"at most {patches} ranks per replica, one per patch, and at most {batch} replicas, one per sample of train.batch"
    if wanted is None:
        raise UserError(f"{size} ranks cannot be divided into equal replicas with {limits}")
    raise UserError(f"parallel.replicas: {wanted} do not fit {size} ranks, expected a divisor with {limits}")
