#!/usr/bin/env bash
# The whole way on a small problem, on two cores in some minutes: simulate turbulence, train, calibrate, sample, evaluate.
# Makes its own environment: bash jobs/demo.sh [FOLDER]. What is there already is reused: the data, and the run, which continues.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source jobs/environment.sh

FOLDER=${1:-${FOLDER:-demo}}
CONFIG=${CONFIG:-configs/demo.yaml}
GRID=${GRID:-32}              # points per axis
SAMPLES=${SAMPLES:-64}        # snapshots to train on
REFERENCE=${REFERENCE:-32}    # snapshots to compare with, from other simulations
STEPS=${STEPS:-1000}          # training steps
COUNT=${COUNT:-16}            # samples to draw
RANKS=${RANKS:-2}

make_environment .venv mpich,report
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p "$FOLDER"

# verb NAME ARGUMENTS...: says what it runs, and runs it.
verb() {
    say "" "\$ mpiexec -n $RANKS ddpatch $*"
    .venv/bin/mpiexec -n "$RANKS" .venv/bin/python -m ddpatch "$@"
}

simulated() { [[ -e $1 ]] || verb simulate isotropic --grid "$GRID" --samples "$2" --seed "$3" --output "$1"; }

simulated "$FOLDER/data.h5" "$SAMPLES" 0
simulated "$FOLDER/reference.h5" "$REFERENCE" 1
verb train "$CONFIG" --run "$FOLDER/run" --set "data.path=$FOLDER/data.h5" --set "train.steps=$STEPS"
verb calibrate "$FOLDER/run" --count 16 || say "" "not calibrated: the network is taken as it is"
verb sample "$FOLDER/run" --count "$COUNT" --output "$FOLDER/samples.h5" --overwrite
verb evaluate "$FOLDER/samples.h5" --reference "$FOLDER/reference.h5" --output "$FOLDER/report" --overwrite
say "" "samples: $FOLDER/samples.h5 (ParaView: $FOLDER/samples.xdmf)" "report:  $FOLDER/report/report.html"
