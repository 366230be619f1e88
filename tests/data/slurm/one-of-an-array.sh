#!/bin/sh
#SBATCH --job-name=gpuq-5eed-0a0b
#SBATCH --output=/dev/null
#SBATCH --open-mode=append
#SBATCH --chdir=/
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gres=gpu:2
#SBATCH --nice=0
#SBATCH --no-requeue
#SBATCH --array=7
case "$SLURM_ARRAY_TASK_ID" in
7) folder=/shared/f7-1-ab ;;
esac
unset SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID SLURM_ARRAY_TASK_COUNT SLURM_ARRAY_TASK_MIN SLURM_ARRAY_TASK_MAX SLURM_ARRAY_TASK_STEP
exec >>"$folder/engine.log" 2>&1
exec /opt/python/bin/python3 -I "$folder/node.py" "$folder"
