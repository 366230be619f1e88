#!/bin/sh
#SBATCH --job-name=gpuq-f0-1-ab
#SBATCH --output=/shared/engines/f0-1-ab/engine.log
#SBATCH --open-mode=append
#SBATCH --chdir=/
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gres=gpu:1
#SBATCH --nice=0
#SBATCH --no-requeue
#SBATCH --time=21
exec /opt/python/bin/python3 -I /shared/engines/kept/f0-1-ab/keep.py /shared/engines/kept/f0-1-ab /shared/engines/f0-1-ab
