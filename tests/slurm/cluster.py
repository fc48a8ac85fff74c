"""A real SLURM of one node in a folder: munged, slurmctld and slurmd on loopback, for the duration of a context.

python tests/slurm/cluster.py      # prints why it cannot run here; nothing if it can
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "squeue", "scontrol")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=pmix
ReturnToService=2
KillWait=10
MinJobAge=600
JobRequeue=1
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """What this machine lacks for :func:`cluster`."""
    lacking = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    return lacking + (["the rights of root"] if os.geteuid() else [])


@contextmanager
def cluster(folder: Path, cpus: int = 2) -> Iterator[dict[str, str]]:
    """Start SLURM; yields the environment for its commands."""
    folder.chmod(0o755)  # munge's socket must be reachable
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(folder=folder, host=socket.gethostname().split(".")[0], ports=_free_ports(2), cpus=cpus))
    (folder / "cgroup.conf").touch()  # without it slurmd looks for one in /etc
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o400)
    environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(conf)}
    names = ("socket", "log-file", "pid-file", "seed-file", "key-file")
    files = {name: folder / f"munge.{name.split('-')[0]}" for name in names} | {"key-file": folder / "key"}
    munged = ["munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in files.items())]
    daemons = []
    try:
        for command in (munged, ["slurmctld", "-D", "-f", str(conf)], ["slurmd", "-D", "-f", str(conf)]):
            with (folder / f"{command[0]}.out").open("w") as out:
                daemons.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True))
            time.sleep(1)
        _wait_until_idle(environment, folder)
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()


def _wait_until_idle(environment: dict[str, str], folder: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done = subprocess.run(["sinfo", "--noheader", "--format=%t"], env=environment, capture_output=True, text=True)
        if done.stdout.strip() == "idle":
            return
        time.sleep(0.5)
    logs = "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("*.log")) + sorted(folder.glob("*.out")))
    raise RuntimeError(f"the node is '{done.stdout.strip()}' {done.stderr.strip()} after {seconds:g} s\n{logs}")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [int(s.getsockname()[1]) for s in sockets]
    finally:
        for s in sockets:
            s.close()


def obstacle() -> str:
    """Why SLURM cannot run here; the empty string if it can."""
    if missing():
        return f"this machine lacks {', '.join(missing())}"
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        try:
            with cluster(Path(folder)):
                return ""
        except RuntimeError as error:
            return f"SLURM does not start: {str(error).splitlines()[0]}"


if __name__ == "__main__":
    print(obstacle())
