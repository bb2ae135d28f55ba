#!/bin/bash
# A SLURM job that starts a run or goes on with it:
#
#     sbatch examples/slurm.sh --config mixtral-8x7b --trainer.default_root_dir /shared/runs/mixtral
#
# The words after the script are options of `fit`. Options of sbatch go before it and replace those below, as in
# `sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 examples/slurm.sh ...`: one task for each GPU. All nodes have
# to see the run directory, the model and the text.
#SBATCH --job-name fit
#SBATCH --nodes 1
#SBATCH --ntasks-per-node 2
#SBATCH --time 24:00:00
#SBATCH --requeue
#SBATCH --signal USR1@120
#SBATCH --open-mode append

# The same number of threads in every start: another one gives other roundings. srun does not take it over by itself.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=$SRUN_CPUS_PER_TASK

# exec: the job's exit code is that of `fit`, and a signal to the batch script reaches it.
exec srun --kill-on-bad-exit eacmoe fit --ckpt_path auto "$@"
