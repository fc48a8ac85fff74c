"""Memory and time of volumes whose features do not fit into memory together: training steps and samples, patch by patch.

    python benchmarks/streaming.py small      # training steps at 128³, beside a U-Net on the whole volume: quarter of an hour
    python benchmarks/streaming.py volume     # a training step at 256³ on 1 and on 2 ranks: half an hour
    python benchmarks/streaming.py sample     # a sample of 512³ in 10 evaluations on 1 and on 2 ranks: an hour

Every case runs in processes of its own with one thread per rank, and needs the machine to itself for its times. Memory
is the high-water mark of resident memory (VmHWM), summed over ranks, each with its interpreter and libraries; memory at
the start is that of what comes before: of training, the moments of the data. A training step is
:meth:`ddpatch.training.Training.advance` on white noise in a file; a sample is what ``ddpatch sample`` does until its file
is complete, with the network of a run of one step. A case that is in the table of the day is not run again: after an
interruption the same command goes on. The report goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
from hardware import describe
from launch import launch
from reports import met, table

from ddpatch.config import Config, build
from ddpatch.data.fields import FieldFile
from ddpatch.io.volume import VolumeHeader, write_volume
from ddpatch.parallel.comm import Communicator
from ddpatch.run import measure_field, resolve
from ddpatch.sample import Sampler, sample
from ddpatch.training import Training

RESULTS = Path(__file__).parent / "results"
Facts = dict[str, float]


@dataclass(frozen=True)
class Case:
    """What runs on a cube of ``grid`` points per axis: ``steps`` timed training steps, or the evaluations of a sample."""

    name: str
    grid: int
    steps: int
    ranks: int = 1
    coupling: str = "two-level"
    at_once: int | None = 1
    patch: int = 32
    channels: tuple[int, ...] = (32, 64, 128)
    tokens: int = 4
    precision: str = "full"

    def config(self, data: Path) -> Config:
        """The configuration of its run."""
        return build(
            {
                "domain": {"patch": [self.patch] * 3},
                "data": {"path": str(data)},
                "model": {"coupling": self.coupling, "channels": self.channels, "tokens": self.tokens},
                "train": {"steps": 1, "batch": 1},
                "execution": {"patches_at_once": self.at_once, "precision": self.precision},
            },
            self.name,
        )


WHOLE, ALL, LOWER, ONE = "U-Net on the whole volume", "all patches at once", "all patches, bfloat16", "one patch at a time"


CASES = {
    "small": [
        Case(WHOLE, 128, 2, coupling="full-domain", at_once=None),
        Case(ALL, 128, 2, at_once=None),
        Case(LOWER, 128, 2, at_once=None, precision="bfloat16"),
        Case(ONE, 128, 2),
    ],
    "volume": [Case(f"256³, {n} rank{'s' * (n - 1)}", 256, 1, n, patch=64) for n in (1, 2)],
    "sample": [
        Case(f"512³, {n} rank{'s' * (n - 1)}", 512, 10, n, patch=64, channels=(16, 32, 64), tokens=2, precision="bfloat16")
        for n in (1, 2)
    ],
}
MOST = 16 * 2**30 / 1e9  # GB of all ranks together


def write_noise(path: Path, grid: int, samples: int) -> None:
    """A file of white noise on a periodic cube."""
    header = VolumeHeader(samples, ("u", "v", "w"), (grid,) * 3, (1.0,) * 3, (True,) * 3)
    draw = np.random.default_rng(0)
    write_volume(path, header, (draw.standard_normal((3, *(grid,) * 3), dtype=np.float32) for _ in range(samples)))


def train_steps(case: Case, folder: Path, comm: Communicator) -> Facts:
    """Median seconds of a training step, and the memory of start-up and steps. Collective.

    Where there are several steps, one more before them is not timed.
    """
    with FieldFile(folder / "data.h5") as file:
        config = resolve(case.config(folder / "data.h5"), file)
        training = Training(config, file, measure_field(config, file, comm), comm)
        start, seconds = highest_memory(comm), []
        forget_highest_memory()
        for _ in range(case.steps + (case.steps > 1)):
            comm.barrier()
            began = time.perf_counter()
            training.advance()
            seconds.append(max(comm.gather(time.perf_counter() - began)))
    return {"seconds": statistics.median(seconds[case.steps > 1 :]), "start": start, "memory": highest_memory(comm)}


def draw_sample(case: Case, folder: Path, comm: Communicator) -> Facts:
    """Seconds from the checkpoint to the file of one sample, and its memory. Collective."""
    start, began = highest_memory(comm), time.perf_counter()
    forget_highest_memory()

    def progress(done: int, total: int) -> None:
        if comm.rank == 0:
            print(f"{case.name}: {done} of {total} evaluations, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)

    sampler = Sampler(folder / "run", comm, (case.grid,) * 3)
    sample(sampler, folder / "sample.h5", 1, steps=case.steps, progress=progress)
    return {"seconds": max(comm.gather(time.perf_counter() - began)), "start": start, "memory": highest_memory(comm)}


def highest_memory(comm: Communicator) -> float:
    """High-water marks of resident memory of all ranks, summed, in GB. Collective."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kibibytes = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return sum(comm.gather(kibibytes)) * 1024 / 1e9


def forget_highest_memory() -> None:
    """Let the high-water mark begin anew from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(what: str, case: Case) -> Facts:
    """Run one case in new processes, on data that are made for it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_noise(folder / "data.h5", case.patch if what == "sample" else case.grid, 1)
        if what == "sample":
            (folder / "run.yaml").write_text(case.config(folder / "data.h5").as_yaml())
            launch(1, "-m", "ddpatch", "train", str(folder / "run.yaml"), "--run", str(folder / "run"))
        found: Facts = json.loads(launch(case.ranks, __file__, what, "--worker", case.name, name).splitlines()[-1])
    return found


def report(what: str, rows: dict[str, Facts], command: str) -> str:
    """The Markdown page."""
    cases, unit = CASES[what], "sample" if what == "sample" else "training step"
    lower = ", bfloat16" * (what == "sample")
    nets = {
        f"- {c.grid}³: U-Net {_dashed(c.channels)}{lower}, patches of {c.patch}³, {c.tokens}³ tokens per patch" for c in cases
    }
    lines = [
        f"# Streaming, {what}: memory and time with 3 channels, {date.today()}",
        "",
        f"{describe()}. `{command}`",
        "",
        *sorted(nets),
        "",
        f"| run | ranks | memory, GB | memory at the start, GB | s per {unit} | kvoxel/s |",
        "|---|---|---|---|---|---|",
        *(_line(case, rows[case.name]) for case in cases),
        "",
        *table(("bar", "found", "met"), bars(what, rows)),
    ]
    return "\n".join(lines)


def bars(what: str, rows: dict[str, Facts]) -> list[tuple[str, str, str]]:
    """What was to be reached, what is, and whether that suffices."""
    if what != "small":
        found = max(facts["memory"] for facts in rows.values())
        return [("memory of all ranks below 16 GiB = 17.2 GB", f"{found:.2f} GB", met(found < MOST))]
    ratios = (
        (f"memory, {ONE} / {WHOLE}: at most 1/8", rows[ONE]["memory"] / rows[WHOLE]["memory"], 1 / 8),
        (f"time, {ALL} / {WHOLE}: at most 1", rows[ALL]["seconds"] / rows[WHOLE]["seconds"], 1.0),
        (f"time, {LOWER} / {WHOLE}: at most 1/2", rows[LOWER]["seconds"] / rows[WHOLE]["seconds"], 1 / 2),
    )
    return [(text, f"{found:.3f}", met(found <= most)) for text, found, most in ratios]


def _line(case: Case, facts: Facts) -> str:
    seconds = facts["seconds"]
    speed = case.grid**3 / seconds / 1e3
    return f"| {case.name} | {case.ranks} | {facts['memory']:.2f} | {facts['start']:.2f} | {seconds:.1f} | {speed:.1f} |"


def _dashed(numbers: tuple[int, ...]) -> str:
    return "-".join(map(str, numbers))


def work(what: str, name: str, folder: Path) -> None:
    """What a rank of a case does. Collective."""
    comm, case = Communicator(), next(case for case in CASES[what] if case.name == name)
    facts = (draw_sample if what == "sample" else train_steps)(case, folder, comm)
    if comm.rank == 0:
        print(json.dumps(facts))


def main() -> None:
    """Run the cases that the table of the day lacks, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=CASES)
    parser.add_argument("--worker", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.what, args.worker[0], Path(args.worker[1]))
        return
    stem = RESULTS / f"streaming_{args.what}_{platform.machine()}_{date.today()}"
    kept = stem.with_suffix(".csv")
    rows: dict[str, Facts] = {}
    if kept.exists():
        with kept.open(newline="") as file:
            rows = {row.pop("run"): {key: float(value) for key, value in row.items()} for row in csv.DictReader(file)}
    for case in CASES[args.what]:
        if case.name not in rows:
            rows[case.name] = measure(args.what, case)
            print(case.name, rows[case.name], flush=True)
            with kept.open("w", newline="") as file:
                writer = csv.DictWriter(file, ("run", *rows[case.name]))
                writer.writeheader()
                writer.writerows({"run": name, **facts} for name, facts in rows.items())
    text = report(args.what, rows, f"python benchmarks/streaming.py {args.what}")
    stem.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
