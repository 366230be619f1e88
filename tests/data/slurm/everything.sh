#!/bin/sh
#SBATCH --job-name=gpuq-f0-1-ab
#SBATCH --output=/shared/engines/f0-1-ab/engine.log
#SBATCH --open-mode=append
#SBATCH --chdir=/
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gres=gpu:a100_80gb:4
#SBATCH --nice=3000
#SBATCH --no-requeue
#SBATCH --time=62
exec /opt/python/bin/python3 -I /shared/engines/f0-1-ab/node.py /shared/engines/f0-1-ab
