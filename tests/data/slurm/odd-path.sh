#!/bin/sh
#SBATCH --job-name=gpuq-f0-2-cd
#SBATCH --output="/shared/it's 100%% ours/f0-2-cd/engine.log"
#SBATCH --open-mode=append
#SBATCH --chdir=/
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gres=gpu:1
#SBATCH --nice=0
#SBATCH --no-requeue
exec /opt/python/bin/python3 -I '/shared/it'"'"'s 100% ours/f0-2-cd/node.py' '/shared/it'"'"'s 100% ours/f0-2-cd'
