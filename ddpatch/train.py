"""Training: one loop that reads top to bottom."""

from __future__ import annotations

from pathlib import Path

from ddpatch.config import Config
from ddpatch.data.fields import FieldFile
from ddpatch.errors import Left
from ddpatch.execution import check_compiler, check_groups, check_precision
from ddpatch.io import checkpoint
from ddpatch.io.volume import replace_when_complete
from ddpatch.log import Log, Progress, forget_rows
from ddpatch.notice import Notice
from ddpatch.parallel.comm import Communicator
from ddpatch.run import (
    Field,
    check_same_run,
    decompose,
    measure_field,
    replicas,
    resolve,
)
from ddpatch.training import Training
from ddpatch.tuning import choose_groups


def train(
    config: Config,
    folder: Path,
    comm: Communicator,
    progress: Progress = lambda row: None,
    time_limit: float | None = None,
) -> None:
    """Train until ``train.steps`` steps are done, from the newest checkpoint in ``folder`` if there is one. Collective.

    Arguments:
        config: As the user wrote it.
        folder: Of the run: config.yaml, log.jsonl and checkpoints.
        comm: All ranks of the run.
        progress: Called on rank 0 with every row of the log.
        time_limit: Seconds after which to leave.

    Raises:
        Left: on all ranks, after a signal to one of them or at the end of the time, when a checkpoint is written.
        UserError: if configuration, data and an earlier part of the run do not fit together.
    """
    with Notice(time_limit) as notice, FieldFile(config.data.path, config.data.name, config.data.axes) as file:
        config = resolve(config, file)
        check_groups(config, decompose(config, comm.size // replicas(config, comm.size)))
        device = comm.place(config.parallel.device, config.parallel.share_device)
        check_precision(config, device)
        check_compiler(config, device)
        origin, state = checkpoint.load_latest(folder, comm) if comm.broadcast(checkpoint.find_all(folder)) else (folder, None)
        if state:
            check_same_run(config, state, folder)
        field = Field.from_state(state["statistics"], origin) if state else measure_field(config, file, comm)
        config = choose_groups(config, file.header, field, comm, device)
        training = Training(config, file, field, comm, notice)
        if state:
            training.restore(state, origin)
        comm.on_root(lambda: start_folder(folder, config, training.step))
        run_steps(training, folder, progress)


def run_steps(training: Training, folder: Path, progress: Progress) -> None:
    """Advance to the last step, with a row of the log and a checkpoint now and then. Collective."""
    settings, comm = training.config.train, training.comm
    writer = checkpoint.CheckpointWriter(folder, comm, settings.keep_last, settings.keep_every)
    with Log(folder / "log.jsonl", training, progress) as log, writer:
        while training.step < settings.steps:
            loss = training.advance()
            done = training.step == settings.steps
            last = done or training.leaving
            log.add(loss)
            if last or training.step % settings.log_every == 0:
                log.write()
            if last or training.step % settings.checkpoint_every == 0:
                writer.save(training.state())
            if training.leaving and not done:
                writer.wait()
                raise Left(f"left on notice after step {training.step}, with a checkpoint; the same command goes on from there")


def start_folder(folder: Path, config: Config, step: int) -> None:
    """Make the folder of a run, write the resolved configuration into it, and forget rows of the log after ``step``."""
    forget_rows(folder / "log.jsonl", step)
    with replace_when_complete(folder / "config.yaml", overwrite=True) as temporary:
        temporary.write_text(config.as_yaml())
