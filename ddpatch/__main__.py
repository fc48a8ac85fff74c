"""The command line: verbs and their arguments, nothing else."""

from __future__ import annotations

import argparse
import math
import os
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from ddpatch import __version__
from ddpatch.config import load
from ddpatch.errors import UserError
from ddpatch.notice import parse_duration
from ddpatch.parallel.comm import Communicator, guard


class Parser(argparse.ArgumentParser):
    """Reports a mistake like every other one: one line, exit code 2, from one rank."""

    def error(self, message: str) -> NoReturn:
        """Raise the message as the user's mistake."""
        raise UserError(f"{message} (see {self.prog} --help)")


def simulate(args: argparse.Namespace, comm: Communicator) -> None:
    """Make a data set of turbulence."""
    from ddpatch.simulate import simulate as run

    with tqdm(desc="simulate", unit="interval", disable=comm.rank > 0) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        run(
            args.kind,
            args.output,
            args.samples,
            args.grid,
            args.seed,
            args.trajectories,
            args.viscosity,
            comm,
            args.device,
            args.overwrite,
            progress,
            args.variable,
        )


def train(args: argparse.Namespace, comm: Communicator) -> None:
    """Train a model, or continue its run."""
    from ddpatch.train import train as run

    config = load(args.config, args.set)
    comm.deterministic = config.parallel.deterministic
    folder = args.run or Path("runs") / args.config.stem
    with tqdm(desc="train", unit="step", total=config.train.steps, disable=comm.rank > 0) as bar:

        def progress(row: dict[str, Any]) -> None:
            bar.update(row["step"] - bar.n)
            bar.set_postfix_str(
                f"loss {row['loss'] or math.nan:.4f}, {row['voxels_per_rank_second']:.3g} voxels/s/rank, "
                f"{row['communication']:.0%} communication, {row['peak_memory_gib']:.2f} GiB"
            )

        run(config, folder, comm, progress, None if args.time_limit is None else parse_duration(args.time_limit))
        bar.update(config.train.steps - bar.n)


def sample(args: argparse.Namespace, comm: Communicator) -> None:
    """Draw samples from a run."""
    from ddpatch.sample import Sampler
    from ddpatch.sample import sample as run

    with tqdm(desc="sample", unit="solver step", disable=comm.rank > 0) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        run(
            Sampler(args.run, comm, args.grid, args.set),
            args.output,
            args.count,
            args.solver,
            args.steps,
            args.shift,
            args.seed,
            args.mode,
            args.overwrite,
            progress,
            None if args.time_limit is None else parse_duration(args.time_limit),
        )


def calibrate(args: argparse.Namespace, comm: Communicator) -> None:
    """Find the scale of noise levels with which samples of a run have the spectrum of its data, and keep it for sampling."""
    from ddpatch.calibrate import calibrate as run
    from ddpatch.calibration import SCALE

    with tqdm(desc="calibrate", unit="solver step", disable=comm.rank > 0) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = run(args.run, comm, args.count, args.solver, args.steps, args.set, progress)
    if comm.rank == 0:
        scale, levels = (" ".join(f"{v:.4g}" for v in part) for part in (found[SCALE].values, found[SCALE].levels))
        print(f"noise scale {scale} at levels {levels}, its mean {found[SCALE].mean:.4f} ± {found['error']:.4f}")
        before, after = found["spectrum"]
        off = f"the energy is off by {found['energy']:+.3f} (logarithm), the spectrum by {before:.3f}"
        print(f"without it {off}, with it by {after:.3f}")


def evaluate(args: argparse.Namespace, comm: Communicator) -> None:
    """Compare samples with a reference."""
    from ddpatch.evaluate import evaluate as run
    from ddpatch.statistics.report import summary

    metrics = run(
        args.samples,
        args.reference,
        args.output,
        comm,
        args.overwrite,
        args.name,
        args.reference_name,
        args.axes,
        args.reference_axes,
        tuple(args.patch) if args.patch else None,
        args.limit,
    )
    if comm.rank == 0:
        print(summary(metrics))
        print(f"report: {args.output / 'report.html'}")


def plan(args: argparse.Namespace, comm: Communicator) -> None:
    """Say what a training needs of every rank: memory, bytes and time."""
    from ddpatch.plan import plan as run

    say: Callable[[str], None] = print if comm.rank == 0 else lambda text: None
    config = load(args.config, args.set)
    run(config, args.ranks, comm, args.channels, args.device, args.memory, args.share, args.ranks_per_node, say)


def info(args: argparse.Namespace, comm: Communicator) -> None:
    """Say what this installation consists of."""
    from ddpatch.info import describe

    text = describe(comm)
    if comm.rank == 0:
        print(text)


def parser() -> argparse.ArgumentParser:
    """The verbs and their arguments."""
    top = Parser(prog="ddpatch", description="Multi-level patch diffusion models. Put mpirun or srun -n N in front of any verb.")
    top.add_argument("--version", action="version", version=f"ddpatch {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)
    _add_simulate(verbs)
    _add_plan(verbs)
    _add_train(verbs)
    _add_sample(verbs)
    _add_calibrate(verbs)
    _add_evaluate(verbs)
    verbs.add_parser("info", help=info.__doc__, description=info.__doc__).set_defaults(run_verb=info)
    return top


def _add_simulate(verbs: Any) -> None:
    verb = verbs.add_parser("simulate", help=simulate.__doc__, description=simulate.__doc__)
    verb.add_argument("kind", help="isotropic (3-D, forced) or kolmogorov (2-D)")
    verb.add_argument("--output", type=Path, required=True, help="HDF5 file to write")
    verb.add_argument("--samples", type=int, default=48, help="snapshots in all (default %(default)s)")
    verb.add_argument("--grid", type=int, default=32, help="points per axis (default %(default)s)")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--trajectories", type=int, help="independent simulations (default: one for 6 samples)")
    verb.add_argument("--viscosity", type=float, help="kinematic (default: what the grid resolves)")
    verb.add_argument("--variable", default="velocity", help="velocity, or vorticity of kolmogorov flow (default %(default)s)")
    verb.add_argument("--device", default="cpu", help="cpu, cuda or auto (default %(default)s)")
    verb.add_argument("--overwrite", action="store_true", help="replace an existing file")
    verb.set_defaults(run_verb=simulate)


def _add_plan(verbs: Any) -> None:
    verb = verbs.add_parser("plan", help=plan.__doc__, description=f"{plan.__doc__} Exit code 2 where the memory is too small.")
    verb.add_argument("config", type=Path, help="YAML file, see configs/")
    verb.add_argument("--ranks", type=int, required=True, help="number of ranks to plan for, none of which is needed")
    verb.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, as in train")
    verb.add_argument("--channels", type=int, help="of the fields, where there are no data yet")
    verb.add_argument("--device", default="cpu", help="cpu, measured here, or a100, h100, h200 (default %(default)s)")
    verb.add_argument("--memory", type=float, metavar="GIB", help="of a rank (default: the GPU's, or a share of this machine's)")
    verb.add_argument("--share", type=float, help="of a GPU's published peak that is reached (default: an assumption)")
    verb.add_argument("--ranks-per-node", type=int, metavar="R", help="ranks that share a node's memory (default: one per core)")
    verb.set_defaults(run_verb=plan)


def _add_train(verbs: Any) -> None:
    verb = verbs.add_parser("train", help=train.__doc__, description=train.__doc__)
    verb.add_argument("config", type=Path, help="YAML file, see configs/")
    verb.add_argument("--run", type=Path, metavar="DIR", help="folder of the run (default: runs/<name of the configuration>)")
    verb.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, for example train.steps=100")
    _add_time_limit(verb, "a checkpoint")
    verb.set_defaults(run_verb=train)


def _add_sample(verbs: Any) -> None:
    verb = verbs.add_parser("sample", help=sample.__doc__, description=sample.__doc__)
    verb.add_argument("run", type=Path, help="folder of the run")
    verb.add_argument("--count", type=int, required=True, help="number of samples")
    verb.add_argument("--output", type=Path, required=True, help="HDF5 file to write; an XDMF sidecar appears beside it")
    verb.add_argument("--solver", help="heun or dpm++2m (default: that of the run)")
    verb.add_argument("--steps", type=int, help="solver steps (default: those of the run)")
    flag = argparse.BooleanOptionalAction
    verb.add_argument("--shift", action=flag, help="tile from another origin in every evaluation (default: as the run says)")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--grid", type=int, nargs="+", metavar="N", help="points of the samples, [nz] ny nx (default: as trained)")
    verb.add_argument("--mode", help="gather, virtual, mpio or auto (default: that of the run)")
    verb.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the run, as in train")
    verb.add_argument("--overwrite", action="store_true", help="replace an existing file")
    _add_time_limit(verb, "the samples that are finished")
    verb.set_defaults(run_verb=sample)


def _add_calibrate(verbs: Any) -> None:
    verb = verbs.add_parser("calibrate", help=calibrate.__doc__, description=calibrate.__doc__)
    verb.add_argument("run", type=Path, help="folder of the run")
    verb.add_argument(
        "--count",
        type=int,
        default=64,
        help="samples of the last of seven trials; the first has a sixteenth, or 8, the others half of it (default %(default)s)",
    )
    verb.add_argument("--solver", help="as in sample")
    verb.add_argument("--steps", type=int, help="as in sample")
    verb.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the run, as in sample")
    verb.set_defaults(run_verb=calibrate)


def _add_time_limit(verb: Any, what: str) -> None:
    verb.add_argument("--time-limit", metavar="HH:MM:SS", help=f"leave with {what} and exit code 75 when it is over")


def _add_evaluate(verbs: Any) -> None:
    verb = verbs.add_parser("evaluate", help=evaluate.__doc__, description=evaluate.__doc__)
    verb.add_argument("samples", type=Path, help="HDF5 file of samples")
    verb.add_argument("--reference", type=Path, required=True, help="HDF5 file of data")
    verb.add_argument("--output", type=Path, required=True, help="folder of the report")
    verb.add_argument("--name", default="fields", help="dataset of the samples (default %(default)s)")
    verb.add_argument("--reference-name", help="dataset of the reference (default: as --name)")
    verb.add_argument("--axes", help="axes of the samples, for example 'sample z y x channel'")
    verb.add_argument("--reference-axes", help="axes of the reference")
    verb.add_argument("--patch", type=int, nargs="+", metavar="P", help="patch shape (default: that of the samples)")
    verb.add_argument("--limit", type=int, help="use at most this many samples of either file")
    verb.add_argument("--overwrite", action="store_true", help="replace an existing report")
    verb.set_defaults(run_verb=evaluate)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code: 0, 2 after a user's mistake, or 75 if it left before its work was done.

    What it writes is not writable for all users, whatever the umask.
    """
    os.umask(os.umask(0) | stat.S_IWOTH)

    def verb(comm: Communicator) -> None:
        args = parser().parse_args(argv)
        args.run_verb(args, comm)

    return guard(verb)


if __name__ == "__main__":
    sys.exit(main())
