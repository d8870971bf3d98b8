#!/usr/bin/env bash
# Two nodes with eight GPUs each, one process for each GPU; checkpoints on a shared file system.
#   RUN=/shared/runs/1 sbatch examples/launch/slurm.sh
#SBATCH --job-name=lazy-orbax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --requeue
# SIGTERM comes two minutes before the end, to the processes: one last save, see preemption.md.
#SBATCH --signal=TERM@120
set -euo pipefail
srun python examples/multihost_train.py --directory="$RUN" --steps="${STEPS:-1000}" --save-every="${EVERY:-100}"
