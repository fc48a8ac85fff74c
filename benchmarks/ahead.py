"""By how much one set of samples is nearer to the data than others, with the error of that.

    python benchmarks/ahead.py reference.h5 ours.h5 theirs.h5 ... --patch 16 16

The lead in a distance d to the reference (ddpatch evaluate) is d(theirs) - d(ours), in units of the noise floor. Its standard
error is that of a bootstrap: samples are drawn again with replacement, the same numbers of all files, since sample k begins with
the same noise in all; so are blocks of neighbouring samples of the reference, which are of one simulation. A lead is beyond noise
where it is more than two standard errors. One training each: what other seeds of the training would give is not in it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ddpatch.data.fields import FieldFile
from ddpatch.evaluate import compare_fields
from ddpatch.parallel.comm import Communicator
from ddpatch.statistics.comparison import distances
from ddpatch.statistics.curves import curves
from ddpatch.statistics.measure import Plan, Sums, measure

BLOCK = 8  # samples of the reference that stay together
ROUNDS = 200
KEYS = ("spectrum", "across_correlation")


def leads(
    reference: Path, ours: Path, theirs: Sequence[Path], patch: tuple[int, ...], comm: Communicator
) -> list[dict[str, tuple[float, float]]]:
    """Lead and standard error over each of ``theirs``, by the name of the distance. Collective.

    Arguments:
        reference: File of the data.
        ours, theirs: Files of samples, as many in each.
        patch: Points of a patch.
        comm: Ranks that share the measurement.
    """
    with FieldFile(reference) as source, FieldFile(ours) as first:
        compared = compare_fields(first, source, comm, patch)
    plan = compared.plan
    known, *found = (measured(path, plan, comm) for path in (reference, ours, *theirs))
    assert compared.floor is not None
    floors = np.array([compared.floor[key] for key in KEYS])

    def lead(drawn: Sequence[int], blocks: Sequence[int]) -> np.ndarray:
        data = curves(known, plan, blocks)
        far = np.array([list(map(distances(curves(sums, plan, drawn), data, compared.last_shell).get, KEYS)) for sums in found])
        return np.asarray((far[1:] - far[0]) / floors, float)

    count, total = len(found[0]["energy"]), len(known["energy"])
    value = lead(range(count), range(total))
    error = np.std([lead(*again) for again in redrawn(count, total)], axis=0)
    return [dict(zip(KEYS, zip(*pair, strict=True), strict=True)) for pair in zip(value.tolist(), error.tolist(), strict=True)]


def measured(path: Path, plan: Plan, comm: Communicator) -> Sums:
    """The sums of every sample of a file."""
    with FieldFile(path) as file:
        return measure(file, range(file.header.samples), plan, comm)


def redrawn(samples: int, total: int) -> Iterator[tuple[list[int], list[int]]]:
    """Numbers of the samples, and of the reference's, for every round of the bootstrap."""
    random = np.random.default_rng(0)
    starts = np.arange(0, total, BLOCK)
    for _ in range(ROUNDS):
        blocks = [range(start, min(start + BLOCK, total)) for start in random.choice(starts, len(starts))]
        yield random.integers(samples, size=samples).tolist(), [n for block in blocks for n in block]


def main() -> None:
    """Print the leads as JSON, one for each of the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("ours", type=Path)
    parser.add_argument("theirs", type=Path, nargs="+")
    parser.add_argument("--patch", type=int, nargs="+", required=True)
    args = parser.parse_args()
    comm = Communicator()
    found = leads(args.reference, args.ours, args.theirs, tuple(args.patch), comm)
    if comm.rank == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
