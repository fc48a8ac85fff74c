# A CPU cluster: Levante at DKRZ, two EPYC 7763 (128 cores) per node. Written from its public documentation, not run there.
# Once, on a login node: source this file; python3 -m venv "$VENV"; MPICC=mpicc "$VENV/bin/pip" install --no-binary mpi4py \
#           -c constraints.txt -e .
# Then: SITE=jobs/env/levante.sh sbatch --account=PROJECT --partition=compute --ntasks-per-node=16 --cpus-per-task=8 jobs/train.sbatch
module purge
module load python3 gcc openmpi
VENV=${VENV:-$PWD/.venv-levante}
MPI=${MPI:-pmix}
export OMP_PROC_BIND=close OMP_PLACES=cores
