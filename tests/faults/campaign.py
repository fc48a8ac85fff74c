"""Kill -9 of a random rank at a random moment, many times: the run goes on, and ends with the weights of an undisturbed one.

    python tests/faults/campaign.py --kills 50 --report benchmarks/results/faults.md

A third of the kills fall at any time of a training, a third when a checkpoint is being written (the temporary file is there), a
third in a sampling, every second of these when batches have come to the disk, the others at any time. After each of them the job
has to end within ten seconds, and the same command has to go on; a finished training has to have the undisturbed run's weights
and averages bit for bit, and a finished sampling its samples, of which those that were on the disk are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path

import h5py
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from problems import small_config, write_fields

RANKS, STEPS, COUNT, GRACE = 2, 60, 40, 10.0
PHASES = ("training", "checkpoint", "sampling")


class Campaign:
    """One folder with the undisturbed results, and the killing."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.config, self.slowest = folder / "config.yaml", 0.0
        train: dict[str, object] = {"steps": STEPS, "checkpoint_every": 2, "log_every": 5}
        data = write_fields(folder / "data.h5")
        self.config.write_text(small_config(data, "float32", train=train, parallel={"deterministic": True}).as_yaml())
        self.seconds = {"training": self.timed(self.training("whole")), "sampling": self.timed(self.sampling("whole"))}

    def training(self, name: str) -> list[str]:
        """The command of a training."""
        return ["train", str(self.config), "--run", str(self.folder / name)]

    def sampling(self, name: str) -> list[str]:
        """The command of a sampling, of the undisturbed run."""
        samples = ["--count", str(COUNT), "--steps", "5", "--output", str(self.folder / f"{name}.h5")]
        return ["sample", str(self.folder / "whole"), *samples]

    def start(self, verb: list[str]) -> subprocess.Popen[bytes]:
        """Start a command on all ranks."""
        mpiexec = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        line = [str(mpiexec), "-n", str(RANKS), sys.executable, "-m", "ddpatch", *verb]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (self.folder / "stderr").open("w") as errors:
            return subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=errors)

    def timed(self, verb: list[str]) -> float:
        """Run a command undisturbed; returns its seconds."""
        begin = time.monotonic()
        if self.start(verb).wait(120):
            raise SystemExit(f"failed undisturbed: {' '.join(verb)}\n{(self.folder / 'stderr').read_text()[-2000:]}")
        return time.monotonic() - begin

    def kill(self, verb: list[str], moment: Callable[[subprocess.Popen[bytes]], None]) -> bool:
        """Start a command and kill a rank at a moment; whether there was still one to kill."""
        job = self.start(verb)
        moment(job)
        ranks = descendants(job.pid, "ddpatch")
        if job.poll() is not None or len(ranks) < RANKS:
            if job.wait(120):
                raise SystemExit(f"failed without being killed: {' '.join(verb)}\n{(self.folder / 'stderr').read_text()[-2000:]}")
            return False
        os.kill(self.random.choice(ranks), signal.SIGKILL)
        begin = time.monotonic()
        try:
            job.wait(GRACE)
            self.slowest = max(self.slowest, time.monotonic() - begin)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"still there {GRACE:g} s after a rank was killed: {' '.join(verb)}") from None
        return True

    def anytime(self, seconds: float) -> Callable[[subprocess.Popen[bytes]], None]:
        """A moment between the start of the ranks and the usual end."""
        return lambda job: time.sleep(self.random.uniform(0.3, 1.0) * seconds)

    def writing(self, run: Path) -> Callable[[subprocess.Popen[bytes]], None]:
        """The moment when the temporary file of a checkpoint is there, one of the next few."""
        skipped = self.random.randrange(5)

        def moment(job: subprocess.Popen[bytes]) -> None:
            seen: set[int] = set()
            while job.poll() is None and len(seen) <= skipped:
                seen |= {entry.inode() for entry in os.scandir(run) if ".checkpoint_" in entry.name} if run.exists() else set()

        return moment

    def on_disk(self, name: str) -> int:
        """How many samples of an unfinished file are kept."""
        journal = self.folder / f".{name}.h5.journal"
        try:
            lines = journal.read_text().splitlines(keepends=True)[1:]
        except FileNotFoundError:  # removed when the series is complete
            return 0
        return sum(len(json.loads(line)) for line in lines if line.endswith("\n"))

    def committing(self, name: str) -> Callable[[subprocess.Popen[bytes]], None]:
        """A moment after the next batches of samples are on the disk, at most three of them."""
        before, batches = self.on_disk(name), self.random.randint(1, 3)

        def moment(job: subprocess.Popen[bytes]) -> None:
            while job.poll() is None and self.on_disk(name) < before + 2 * batches:
                time.sleep(0.001)
            time.sleep(self.random.uniform(0, 0.1))

        return moment

    def equal_weights(self, run: Path) -> bool:
        """Whether a finished run has the undisturbed run's weights."""
        states = [torch.load(f / f"checkpoint_{STEPS:08d}.pt", weights_only=True) for f in (run, self.folder / "whole")]
        return all(torch.equal(states[0][k][n], states[1][k][n]) for k in ("model", "ema") for n in states[0][k])

    def equal_samples(self, name: str) -> bool:
        """Whether a finished file has the undisturbed samples."""
        with h5py.File(self.folder / f"{name}.h5") as found, h5py.File(self.folder / "whole.h5") as expected:
            return np.array_equal(found["fields"][:], expected["fields"][:])


def descendants(parent: int, word: str) -> list[int]:
    """Processes below one whose command line has a word."""
    found, children = [], Path(f"/proc/{parent}/task/{parent}/children")
    for child in children.read_text().split() if children.exists() else ():
        try:
            line = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
            found += [int(child)] if word in line and "-n" not in line else []
            found += descendants(int(child), word)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def run(kills: int, folder: Path, seed: int) -> list[str]:
    """The campaign; returns the lines of the report."""
    campaign, done, finished = Campaign(folder, seed), Counter[str](), Counter[str]()
    rounds = kept = 0
    while sum(done.values()) < kills:
        rounds += 1
        name = f"round{rounds}"
        wanted = PHASES[sum(done.values()) * len(PHASES) // kills]
        verb = campaign.sampling(name) if wanted == "sampling" else campaign.training(name)
        while sum(done.values()) < kills and wanted == PHASES[sum(done.values()) * len(PHASES) // kills]:
            usual = campaign.seconds["sampling" if wanted == "sampling" else "training"]
            moment = campaign.writing(folder / name) if wanted == "checkpoint" else campaign.anytime(usual)
            if wanted == "sampling" and done[wanted] % 2:
                moment = campaign.committing(name)
            before = campaign.on_disk(name)
            if not campaign.kill(verb, moment):
                break
            done[wanted] += 1
            kept += campaign.on_disk(name) - before
            print(f"kill {sum(done.values())} ({wanted})", flush=True)
            if (folder / f"{name}.h5").exists():  # the kill came after the end
                break
        else:
            campaign.timed(verb)
        equal = campaign.equal_samples(name) if wanted == "sampling" else campaign.equal_weights(folder / name)
        if not equal:
            raise SystemExit(f"{name}, after kills in {wanted}: not the result of the undisturbed run")
        finished[wanted] += 1
    lines = [f"| {phase} | {done[phase]} | {finished[phase]} |" for phase in PHASES]
    lines += ["", f"A job ended at most {campaign.slowest:.1f} s after the kill. {kept} samples of killed jobs were kept."]
    return ["| killed during | kills | runs that ended with the undisturbed result, all |", "|---|---|---|", *lines]


def main() -> None:
    """Read the arguments, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        table = run(args.kills, Path(folder), args.seed)
    command = f"python tests/faults/campaign.py --kills {args.kills} --seed {args.seed}"
    text = "\n".join([f"# {args.kills} kills, {RANKS} ranks of MPICH, {date.today()}", "", f"`{command}`", "", *table, ""])
    print(text)
    if args.report:
        args.report.write_text(text)


if __name__ == "__main__":
    main()
