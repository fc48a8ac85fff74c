#!/usr/bin/env bash
# Runs every check: bash tests/run.sh. Installs what it needs into .venv (and .venv-mpio); every leg runs even if an earlier one
# failed; the exit code is 0 only if none did. A leg that this machine cannot run is named in the last lines.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source jobs/environment.sh

LEG_SECONDS=${LEG_SECONDS:-1800}
export OMP_NUM_THREADS=1
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 # Open MPI: containers run as root

SUMMARY=()
PASSED=0
FAILED=0
NOT_RUN=()

# leg NAME COMMAND...: runs a command within the time limit and remembers how it ended.
leg() {
    local name=$1 start=$SECONDS code=0
    shift
    printf '\n=== %s: %s\n' "$name" "$*"
    timeout --kill-after=30 "$LEG_SECONDS" "$@" || code=$?
    if ((code == 0)); then
        PASSED=$((PASSED + 1))
        SUMMARY+=("passed  $name ($((SECONDS - start)) s)")
    else
        FAILED=$((FAILED + 1))
        SUMMARY+=("FAILED  $name (exit code $code after $((SECONDS - start)) s)")
    fi
}

skip_leg() {
    NOT_RUN+=("$1: $2")
    SUMMARY+=("NOT RUN $1: $2")
}

finish() {
    local line
    printf '\n%s\n' "=== legs"
    printf '%s\n' "${SUMMARY[@]}"
    for line in ${NOT_RUN[@]+"${NOT_RUN[@]}"}; do
        printf '\n%s\n' "!!! DID NOT RUN: $line"
    done
    printf '\n%s\n' "=== $FAILED failed, $PASSED passed, ${#NOT_RUN[@]} skipped in $SECONDS s ==="
    exit $((FAILED > 0))
}

multiarch() { gcc -print-multiarch 2>/dev/null || dpkg-architecture -qDEB_HOST_MULTIARCH; }

# What the leg with parallel HDF5 lacks; nothing if it can run.
missing_for_mpio() {
    [[ -n $MPICC && -n $MPIRUN ]] || echo "Open MPI's mpicc and mpirun (Debian, Ubuntu: libopenmpi-dev openmpi-bin)"
    [[ -e $HDF5_OPENMPI/include/hdf5.h || -e $HDF5_OPENMPI/lib/libhdf5.so ]] || echo "parallel HDF5 (libhdf5-openmpi-dev)"
    [[ -e $(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h ]] || echo "Python.h (python3-dev)"
}

# h5py against the system's parallel HDF5, built once and kept as a wheel.
build_h5py() {
    local version=$1 wheels=$2
    compgen -G "$wheels/h5py-$version-*.whl" >/dev/null && return 0
    say "mpio: building h5py $version with parallel HDF5 (2 to 4 minutes)"
    CC=$MPICC HDF5_MPI=ON CFLAGS="-O1 -g0" HDF5_DIR=$HDF5_OPENMPI \
        .venv-mpio/bin/python -m pip wheel -qq --no-deps --no-cache-dir --no-binary h5py -w "$wheels" "h5py==$version"
}

make_mpio_environment() {
    local version wheels
    make_environment .venv-mpio test || return 1
    version=$(sed -n 's/^h5py==//p' constraints.txt)
    wheels=.wheels/$({ "$MPIRUN" --version && .venv-mpio/bin/python -VV && readlink -f "$HDF5_OPENMPI"/lib/libhdf5.so; } | sha256sum | cut -c 1-16)
    if .venv-mpio/bin/python -c 'import h5py; assert h5py.get_config().mpi' 2>/dev/null; then
        return 0
    fi
    build_h5py "$version" "$wheels" || return 1
    .venv-mpio/bin/python -m pip install -qq --disable-pip-version-check --no-deps --force-reinstall "$wheels"/h5py-"$version"-*.whl
}

mpio_leg() {
    local name="parallel HDF5, 3 ranks of Open MPI" missing
    HDF5_OPENMPI=/usr/lib/$(multiarch || true)/hdf5/openmpi
    MPICC=$(command -v mpicc.openmpi || true)
    MPIRUN=$(command -v mpirun.openmpi || true)
    missing=$(missing_for_mpio | paste -sd ';')
    if [[ -n $missing ]]; then
        skip_leg "$name" "this machine lacks $missing"
    elif make_mpio_environment; then
        leg "$name" "$MPIRUN" --oversubscribe --bind-to none -n 3 .venv-mpio/bin/python -c 'import h5py, pytest, sys
assert h5py.get_config().mpi, "h5py was built without MPI"
sys.exit(pytest.main(["-q", "--color=no", "--with-mpi", "tests/mpi"]))'
    else
        leg "$name" false
    fi
}

# The job scripts in a SLURM of one node, which the test starts itself; the environment is that of the leg before.
slurm_leg() {
    local name="SLURM, 2 ranks of Open MPI" missing
    missing=$(.venv/bin/python tests/slurm/cluster.py)
    if [[ -n $missing ]]; then
        skip_leg "$name" "$missing (Debian, Ubuntu: slurm-wlm munge)"
    elif ! .venv-mpio/bin/python -c 'import ddpatch, mpi4py' 2>/dev/null; then
        skip_leg "$name" "there is no environment with Open MPI"
    else
        leg "$name" .venv-mpio/bin/python -m pytest -q --color=no -o faulthandler_timeout=500 tests/slurm
    fi
}

make_environment .venv mpich,test,lint || leg "installation" false
if ((FAILED > 0)); then finish; fi

leg "ruff check" .venv/bin/ruff check .
leg "ruff format" .venv/bin/ruff format --check .
leg "mypy" .venv/bin/python -m mypy
leg "serial" .venv/bin/python -m pytest -q --numprocesses 2 --dist worksteal tests
for ranks in 1 2 3; do
    leg "$ranks ranks" .venv/bin/mpiexec -n "$ranks" .venv/bin/python -m pytest -q --color=no --with-mpi tests
done
leg "4 ranks" env DDPATCH_CI=1 .venv/bin/mpiexec -n 4 .venv/bin/python -m pytest -q --color=no --with-mpi tests
mpio_leg
slurm_leg
finish
