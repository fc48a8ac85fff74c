#!/usr/bin/env bash
# The whole way on a small problem, on two cores in minutes: simulate turbulence, train on two ranks, sample on three, evaluate.
# Makes its own environment: bash jobs/demo.sh [FOLDER]. The report is FOLDER/report/report.html.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source jobs/environment.sh

FOLDER=${1:-${FOLDER:-demo}}
CONFIG=${CONFIG:-configs/demo.yaml}
SAMPLES=${SAMPLES:-64}        # simulated snapshots
GRID=${GRID:-32}              # points per axis
STEPS=${STEPS:-1500}          # training steps
COUNT=${COUNT:-8}             # samples to draw
TRAIN_RANKS=${TRAIN_RANKS:-2}
SAMPLE_RANKS=${SAMPLE_RANKS:-3} # a run made by one number of ranks serves any other

make_environment .venv mpich,report
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export MPIR_CVAR_CH4_PROGRESS_THROTTLE=1 # MPICH: ranks that wait give way where there are more than cores
mkdir -p "$FOLDER"

# ddpatch_on RANKS VERB...: says what it runs, and runs it.
ddpatch_on() {
    local ranks=$1
    shift
    say "" "\$ mpiexec -n $ranks ddpatch $*"
    .venv/bin/mpiexec -n "$ranks" .venv/bin/python -m ddpatch "$@"
}

ddpatch_on 1 info
[[ -e $FOLDER/data.h5 ]] || ddpatch_on 2 simulate isotropic --grid "$GRID" --samples "$SAMPLES" --output "$FOLDER/data.h5"
ddpatch_on "$TRAIN_RANKS" train "$CONFIG" --run "$FOLDER/run" --set "data.path=$FOLDER/data.h5" --set "train.steps=$STEPS"
ddpatch_on "$SAMPLE_RANKS" sample "$FOLDER/run" --count "$COUNT" --output "$FOLDER/samples.h5" --overwrite
ddpatch_on 2 evaluate "$FOLDER/samples.h5" --reference "$FOLDER/data.h5" --output "$FOLDER/report" --overwrite
say "" "report: $FOLDER/report/report.html"
