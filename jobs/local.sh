#!/usr/bin/env bash
# Trains on this machine, without a batch system: bash jobs/local.sh CONFIG RUN [RANKS] [OPTIONS OF ddpatch train]
# SIGTERM or SIGUSR1 to a rank makes all of them leave with a checkpoint (exit code 75); the same command goes on from there.
set -euo pipefail
if (($# < 2)); then
    echo "usage: bash jobs/local.sh CONFIG RUN [RANKS] [OPTIONS]" >&2
    exit 2
fi
CONFIG=$1 RUN=$2 RANKS=${3:-2}
VENV=${VENV:-.venv}
MPIEXEC=${MPIEXEC:-$VENV/bin/mpiexec}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$MPIEXEC" -n "$RANKS" "$VENV/bin/python" -m ddpatch train "$CONFIG" --run "$RUN" "${@:4}"
