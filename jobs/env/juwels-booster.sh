# An NVIDIA cluster: JUWELS Booster at JSC, four A100 per node. Written from its public documentation, not run there.
# Once, on a login node: source this file; python -m venv --system-site-packages "$VENV"; "$VENV/bin/pip" install -c constraints.txt -e .
# Then: SITE=jobs/env/juwels-booster.sh sbatch --account=PROJECT --partition=booster --ntasks-per-node=4 --gres=gpu:4 \
#           --cpus-per-task=12 jobs/train.sbatch
module --force purge
module load Stages/2025 GCC ParaStationMPI Python mpi4py h5py PyTorch
VENV=${VENV:-$PWD/.venv-juwels}
MPI=${MPI:-pspmi}
export CUDA_VISIBLE_DEVICES=0,1,2,3 # all of them for every rank, which takes the one of its place on the node
