"""One scheme of turbulence.py in processes of its own: samples are drawn and compared with the reference.

    mpiexec -n 2 python benchmarks/turbulence_worker.py RUN moving 256 halo.h5 reference.h5 16x16

RUN is the folder of a run. Prints a line of JSON: distances, and what drawing took.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from turbulence_page import DISTANCES, FACTS, GIVEN

from ddpatch.calibration import CALIBRATION, read_calibration
from ddpatch.data.fields import FieldFile
from ddpatch.decomposition import Decomposition
from ddpatch.diffusion.level_scale import EXACT
from ddpatch.diffusion.solvers import Denoise
from ddpatch.evaluate import compare_fields
from ddpatch.log import peak_memory
from ddpatch.model.patches import cut, join
from ddpatch.model.two_level import count_parameters
from ddpatch.parallel.comm import Communicator
from ddpatch.random import Stream, patch_noise
from ddpatch.run import dtype
from ddpatch.sample import Sampler, sample

WAYS = ("moving", "fixed", "lagged", "overlap", GIVEN)


def work(run: Path, way: str, count: int, samples: Path, reference: Path, patch: tuple[int, ...]) -> None:
    """Draw samples, unless the file is given, compare them, and print what was found and what drawing took. Collective."""
    comm = Communicator()
    facts: dict[str, Any] = dict.fromkeys(FACTS) if way == GIVEN else draw(run, way, count, samples, patch, comm)
    found = compare(samples, reference, patch, comm)
    if comm.rank == 0:
        print(json.dumps({**found, **facts}))


def draw(run: Path, way: str, count: int, output: Path, patch: tuple[int, ...], comm: Communicator) -> dict[str, Any]:
    """Draw samples; returns what it took. Collective.

    Their noise follows the seed of the training, and is not that of its calibration, which is of seed 0. That of a full domain,
    which is one patch, is put together from what the patches of the others have: sample k begins alike in all schemes.
    """
    sampler = Sampler(run, comm)
    whole = sampler.config.model.paths.whole
    scale, seed = EXACT if way == "overlap" else sampler.level_scale("dpm++2m", 20), sampler.config.train.seed + 1
    if way == "lagged":
        sampler = Sampler(run, comm, overrides=["sample.lagged=true"])
    if way == "overlap":
        sampler.denoise = averaged(sampler.denoise, sampler.decomposition)  # type: ignore[assignment]
    if whole:
        sampler.noise = partial(joined_noise, sampler, patch)  # type: ignore[method-assign]
    comm.bytes.clear()
    start = time.perf_counter()
    sample(sampler, output, count, "dpm++2m", 20, shift=way == "moving", seed=seed, overwrite=True, level_scale=scale)
    return {
        "energy": read_calibration(run / CALIBRATION).get("energy"),
        "level_scale": scale.mean,
        "seconds": (time.perf_counter() - start) / count,
        "memory": max(comm.gather(peak_memory(sampler.device))) / 2**30,
        "bytes": sum(comm.gather(sum(comm.bytes[kind] for kind in ("halo", "allgather", "roll")))) / count * (comm.size > 1),
        "parameters": count_parameters(sampler.model),
    }


def joined_noise(sampler: Sampler, patch: tuple[int, ...], samples: Sequence[int], seed: int) -> Tensor:
    """The noise of smaller patches, as that of the one patch of a full domain."""
    grid = Decomposition(sampler.decomposition.grid_shape, patch, 1)
    shape = (len(sampler.field.channels), *patch)
    noise = patch_noise(shape, seed, Stream.SAMPLE, samples, 0, range(grid.num_patches), dtype(sampler.config))
    return join(noise, grid)[:, None]


def averaged(denoise: Denoise, grid: Decomposition) -> Denoise:
    """The mean of the predictions in all tilings that are shifted by half a patch."""
    shifts = list(product(*((0, n // 2) for n in grid.patch_shape)))

    def over_tilings(x: Tensor, sigma: Tensor) -> Tensor:
        field, total = join(x, grid), torch.zeros(())
        dims = tuple(range(2, field.ndim))
        for shift in shifts:
            found = join(denoise(cut(field.roll([-s for s in shift], dims), grid), sigma), grid)
            total = total + found.roll(shift, dims) / len(shifts)
        return cut(total, grid)

    return over_tilings


def compare(samples: Path, reference: Path, patch: tuple[int, ...], comm: Communicator) -> dict[str, float | None]:
    """Distances of a file to the reference (ddpatch evaluate). Collective."""
    with FieldFile(samples) as generated, FieldFile(reference) as source:
        headline = compare_fields(generated, source, comm, patch).headline()
    ratios = {key: headline[key]["ratio"] for key in DISTANCES}
    seams = {"seam_ratio": headline["seam_ratio"]["value"], "reference_seam_ratio": headline["seam_ratio"]["reference"]}
    return {**ratios, "spectrum_error": headline["spectrum"]["value"], **seams}


def main() -> None:
    """Read the arguments. Collective."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="of the network")
    parser.add_argument("way", choices=WAYS, help="of sampling")
    parser.add_argument("count", type=int, help="of samples")
    parser.add_argument("samples", type=Path, help="file of the samples")
    parser.add_argument("reference", type=Path, help="file of the reference")
    parser.add_argument("patch", help="points per axis, such as 16x16")
    args = parser.parse_args()
    patch = tuple(map(int, args.patch.split("x")))
    work(args.run, args.way, args.count, args.samples, args.reference, patch)


if __name__ == "__main__":
    main()
