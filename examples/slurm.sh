#!/usr/bin/env bash
# Train on several machines with Slurm: one papermill notebook per machine, which starts torchrun there.
#
#     sbatch examples/slurm.sh                                  # with the defaults below
#     RECIPE=d32_stage1 IMAGES=/data/train.txt sbatch --nodes 4 --gpus-per-node 8 examples/slurm.sh
#
# Submit the same command again to resume from the last checkpoint; Slurm resumes after a preemption (--requeue).

#SBATCH --job-name=bitvae
#SBATCH --nodes=4                # machines
#SBATCH --gpus-per-node=8        # GPUs per machine; one process per GPU
#SBATCH --ntasks-per-node=1      # one notebook per machine; torchrun starts the processes
#SBATCH --cpus-per-task=64       # cores per machine, for the processes and their data loaders
#SBATCH --time=24:00:00          # time limit; submit again to resume
#SBATCH --signal=TERM@120        # SIGTERM two minutes earlier, to finish the step and write a checkpoint
#SBATCH --requeue                # queue again after a preemption or a machine failure
#SBATCH --output=%x-%j.out       # output of all machines

set -euo pipefail

RECIPE=${RECIPE:-d16_stage1}                # one of bitvae.recipes.RECIPES
OVERRIDES=${OVERRIDES:-"{}"}                # recipe values to override, as JSON: {"batch": 16, "precision": "bf16"}
IMAGES=${IMAGES:-bundled}                   # a folder, a list (.txt), tar shards or datasets:NAME, readable by all machines
RUN=${RUN:-runs/$RECIPE}                    # the run's folder, on storage that all machines share
PROCESSES=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}  # processes per machine: one per GPU
WORKERS=${WORKERS:-6}                       # data loading processes per training process
PORT=${PORT:-29500}                         # free port of the first machine, for the rendezvous
BITVAE=${BITVAE:-.venv/bin/bitvae}          # the installed command
CACHE=${CACHE:-/tmp/bitvae-$(id -u)}     # local disk of each machine: compiled kernels, kept for a requeued job

export NODES=$SLURM_JOB_NUM_NODES
export FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export RECIPE OVERRIDES IMAGES RUN PROCESSES WORKERS PORT BITVAE
export TRITON_CACHE_DIR=$CACHE/triton TORCHINDUCTOR_CACHE_DIR=$CACHE/inductor

# Each machine writes its own executed notebook, numbered by SLURM_NODEID; that of machine 0 is the record.
# srun does not inherit --cpus-per-task. --kill-on-bad-exit stops the other machines when one fails.
exec srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 bash -c '
  exec "$BITVAE" run nbs/experiments/train.ipynb "$RUN/train-node$SLURM_NODEID.ipynb" \
    --set recipe="$RECIPE" --set overrides="$OVERRIDES" --set images="$IMAGES" --set folder="$RUN" \
    --set workers="$WORKERS" --set processes="$PROCESSES" --set nodes="$NODES" --set rendezvous="$FIRST:$PORT"
'
