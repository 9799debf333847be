#!/usr/bin/env bash
# Train over several machines under Slurm: one papermill notebook per machine, which starts torchrun there.
#
#     sbatch examples/slurm.sh                                  # the variables below as they are
#     RECIPE=d32_stage1 IMAGES=/data/train.txt sbatch --nodes 4 --gpus-per-node 8 examples/slurm.sh
#
# Submitting the same again goes on from the last checkpoint; so does Slurm after a preemption (--requeue).

#SBATCH --job-name=bitvae
#SBATCH --nodes=4                # machines
#SBATCH --gpus-per-node=8        # GPUs of each, one process per GPU
#SBATCH --ntasks-per-node=1      # one notebook per machine: torchrun starts the other processes
#SBATCH --cpus-per-task=64       # cores per machine, for the processes and their loaders
#SBATCH --time=24:00:00          # the run is stopped then, and goes on when submitted again
#SBATCH --signal=TERM@120        # two minutes before that: time to end the step and write a checkpoint
#SBATCH --requeue                # after a preemption or a failed machine, queue again by itself
#SBATCH --output=%x-%j.out       # what all machines say

set -euo pipefail

RECIPE=${RECIPE:-d16_stage1}                # one of bitvae.recipes.RECIPES
OVERRIDES=${OVERRIDES:-"{}"}                # values of the recipe to replace, as JSON: {"batch": 16, "precision": "bf16"}
IMAGES=${IMAGES:-bundled}                   # a folder, a list (.txt), tar shards or datasets:NAME, which every machine can read
RUN=${RUN:-runs/$RECIPE}                    # folder of the run, on storage that all machines share
PROCESSES=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}  # processes per machine: one per GPU
WORKERS=${WORKERS:-6}                       # processes that load images, for each process that trains
PORT=${PORT:-29500}                         # where the machines meet, on the first of them; free there
BITVAE=${BITVAE:-.venv/bin/bitvae}          # the installed command

export NODES=$SLURM_JOB_NUM_NODES
export FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export RECIPE OVERRIDES IMAGES RUN PROCESSES WORKERS PORT BITVAE

# SLURM_NODEID numbers the machines: each keeps an executed notebook of its own, the first one's is the record
# srun does not take over --cpus-per-task by itself; when one machine fails for good, the others are not left waiting
exec srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 bash -c '
  exec "$BITVAE" run nbs/experiments/train.ipynb "$RUN/train-node$SLURM_NODEID.ipynb" \
    --set recipe="$RECIPE" --set overrides="$OVERRIDES" --set images="$IMAGES" --set folder="$RUN" \
    --set workers="$WORKERS" --set processes="$PROCESSES" --set nodes="$NODES" --set rendezvous="$FIRST:$PORT"
'
