"""A failure on one rank ends the job within seconds, with that rank's words. Every job here is a real one, under mpiexec."""

from __future__ import annotations

from pathlib import Path

import pytest
from problems import small_config, write_fields

from jobs import LIMIT, NEEDS_MPIEXEC, launch, script

pytestmark = NEEDS_MPIEXEC


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_an_exception_on_any_rank_ends_the_job_with_its_traceback(tmp_path: Path, rank: int) -> None:
    done, _ = launch(3, script(tmp_path, f"if comm.rank == {rank}:\n    raise ValueError('boom')\ncomm.barrier()"))
    assert done.returncode != 0
    assert f"rank {rank} of 3 failed" in done.stderr and "ValueError: boom" in done.stderr


PHASES = {
    "read": ("ddpatch.data.batches", "PatchBatches", "read"),
    "forward": ("ddpatch.model.unet", "Decoder", "forward"),
    "gather": ("ddpatch.parallel.collectives", "Exchange", "start_gather"),
    "backward": ("ddpatch.parallel.gradients", "GradientSum", "_arrived"),
    "write": ("ddpatch.io.checkpoint", "CheckpointWriter", "save"),
}


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("phase", PHASES)
def test_an_exception_in_any_phase_of_a_training_ends_the_job(tmp_path: Path, phase: str, rank: int) -> None:
    """The second call of a function of that phase fails on one rank; the others wait for it wherever they are."""
    module, owner, name = PHASES[phase]
    config = small_config(write_fields(tmp_path / "data.h5"), train={"steps": 50, "checkpoint_every": 1})
    (tmp_path / "config.yaml").write_text(config.as_yaml())
    job = (
        f"import {module} as module\nfrom ddpatch.config import load\nfrom ddpatch.train import train\nfrom pathlib import Path\n"
        f"known, calls = module.{owner}.{name}, []\n"
        "def failing(*args, **kwargs):\n"
        "    calls.append(time.monotonic())\n"
        f"    if len(calls) == 2 and comm.rank == {rank}:\n"
        f"        print('raised', flush=True)\n"
        f"        raise RuntimeError('boom in {phase}')\n"
        "    return known(*args, **kwargs)\n"
        f"module.{owner}.{name} = failing\n"
        f"train(load({str(tmp_path / 'config.yaml')!r}), Path({str(tmp_path / 'run')!r}), comm)"
    )
    done, seconds = launch(3, script(tmp_path, job))
    assert done.returncode != 0 and "raised" in done.stdout
    assert f"rank {rank} of 3 failed" in done.stderr and f"RuntimeError: boom in {phase}" in done.stderr
    assert seconds < LIMIT / 2  # the start included; nobody waited


@pytest.mark.parametrize(("rank", "call"), [(0, "allreduce_(torch.ones(3))"), (2, "finish_sum(comm.start_sum(torch.ones(3)))")])
def test_an_exception_ends_a_job_whose_ranks_wait_in_torch_distributed(tmp_path: Path, rank: int, call: str) -> None:
    job = (
        "import torch\ncomm.connect('torch', torch.device('cpu'))\ncomm.allreduce_(torch.ones(3))\n"
        f"if comm.rank == {rank}:\n    time.sleep(1)\n    raise ValueError('boom')\ncomm.{call}"
    )
    done, seconds = launch(3, script(tmp_path, job))
    assert done.returncode != 0
    assert f"rank {rank} of 3 failed" in done.stderr and "ValueError: boom" in done.stderr
    assert seconds < LIMIT / 2


def test_a_job_that_used_torch_distributed_ends_without_a_word(tmp_path: Path) -> None:
    """Though nobody frees the communicators, and one rank comes late."""
    job = (
        "import torch\ncomm.connect('torch', torch.device('cpu'))\npart = comm.split(comm.rank % 2)\n"
        "part.allreduce_(torch.ones(3))\nif comm.rank == 1:\n    time.sleep(1)"
    )
    done, _ = launch(3, script(tmp_path, job))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_transport_that_does_not_work_here_is_one_line(tmp_path: Path) -> None:
    done, _ = launch(3, script(tmp_path, "import torch\ncomm.connect('cuda-aware', torch.device('cpu'))"))
    assert done.returncode == 2
    assert done.stderr.count("ddpatch: error: parallel.transport: cuda-aware: expected a GPU on every rank") == 1
    assert "Traceback" not in done.stderr


def test_a_mistake_that_one_rank_finds_ends_the_job_with_its_line(tmp_path: Path) -> None:
    done, _ = launch(2, script(tmp_path, "if comm.rank == 1:\n    raise UserError('file: bad')\ncomm.barrier()"))
    assert done.returncode == 2
    assert "ddpatch: error: file: bad (rank 1)" in done.stderr and "Traceback" not in done.stderr


def test_a_mistake_that_all_ranks_find_is_reported_once(tmp_path: Path) -> None:
    done, _ = launch(3, script(tmp_path, "raise UserError('file: bad')"))
    assert done.returncode == 2
    assert done.stderr.count("ddpatch: error: file: bad") == 1 and "Traceback" not in done.stderr


def test_a_gpu_that_is_full_is_one_line_with_what_to_change(tmp_path: Path) -> None:
    text = "CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has a total capacity of 8.00 GiB. Of the allocated memory ..."
    body = f"import torch\nif comm.rank == 1:\n    raise torch.cuda.OutOfMemoryError({text!r})\ncomm.barrier()"
    done, _ = launch(2, script(tmp_path, body))
    assert done.returncode == 2
    assert "error: memory: CUDA out of memory; Tried to allocate 9.00 GiB; GPU 0 has a total capacity of 8.00 GiB;" in done.stderr
    assert "execution.patches_at_once" in done.stderr and "(rank 1)" in done.stderr and "Traceback" not in done.stderr


def test_plain_scripts_are_covered_too(tmp_path: Path) -> None:
    path = tmp_path / "plain.py"
    path.write_text(
        "from ddpatch.parallel.comm import Communicator\n"
        "comm = Communicator()\n"
        "if comm.rank == 1:\n    raise ValueError('boom')\n"
        "comm.barrier()\n"
    )
    done, _ = launch(2, path)
    assert done.returncode != 0 and "ValueError: boom" in done.stderr


def test_ranks_that_do_not_fit_patches_and_batch_are_one_line_with_all_numbers(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(small_config(write_fields(tmp_path / "data.h5"), domain={"patch": [16, 8]}, train={"batch": 1}).as_yaml())
    done, _ = launch(4, "-m", "ddpatch", "train", config, "--run", tmp_path / "run")
    assert done.returncode == 2
    assert (
        done.stderr.count("4 ranks cannot be divided into equal replicas with at most 3 ranks per replica") == 1
        and "Traceback" not in done.stderr
    )


def test_a_misspelt_key_on_two_ranks_is_one_line(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("domain: {patch: [8, 8]}\ndata: {path: x.h5}\ntrain: {stps: 3}\n")
    done, _ = launch(2, "-m", "ddpatch", "train", config, "--run", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr.count("unknown key 'train.stps', did you mean 'steps'?") == 1 and "Traceback" not in done.stderr
