#!/bin/sh
#SBATCH --job-name=gpuq-5eed-0a0b
#SBATCH --output=/dev/null
#SBATCH --open-mode=append
#SBATCH --chdir=/
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gres=gpu:1
#SBATCH --nice=0
#SBATCH --no-requeue
#SBATCH --time=2
#SBATCH --array=0-2
case "$SLURM_ARRAY_TASK_ID" in
0) folder=/shared/f0-1-ab ;;
1) folder=/shared/f1-1-ab ;;
2) folder=/shared/f2-1-ab ;;
esac
unset SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID SLURM_ARRAY_TASK_COUNT SLURM_ARRAY_TASK_MIN SLURM_ARRAY_TASK_MAX SLURM_ARRAY_TASK_STEP
exec >>"$folder/engine.log" 2>&1
exec /opt/python/bin/python3 -I "$folder/node.py" "$folder"
