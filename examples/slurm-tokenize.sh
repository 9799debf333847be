#!/usr/bin/env bash
# Tokenize a data set on several machines with Slurm: one command per machine, which starts torchrun there.
#
#     sbatch examples/slurm-tokenize.sh                                  # with the defaults below
#     IMAGES=/data/train.txt OPTIONS="--aspect-ratios --budget 0.25M" sbatch --nodes 4 examples/slurm-tokenize.sh
#
# Submit the same command again to resume: finished shards stay. Slurm resumes after a preemption (--requeue).

#SBATCH --job-name=bitvae-tokenize
#SBATCH --nodes=4                # machines
#SBATCH --gpus-per-node=8        # GPUs per machine; one process per GPU
#SBATCH --ntasks-per-node=1      # one command per machine; torchrun starts the processes
#SBATCH --cpus-per-task=64       # cores per machine, for the processes and their threads that decode images
#SBATCH --time=24:00:00          # time limit; submit again to resume
#SBATCH --requeue                # queue again after a preemption or a machine failure
#SBATCH --output=%x-%j.out       # output of all machines

set -euo pipefail

TOKENIZER=${TOKENIZER:-demo}                # a folder, a checkpoint, or a name
IMAGES=${IMAGES:-bundled}                   # folder, list (.txt), tar shards or datasets:NAME; several, with spaces
FOLDER=${FOLDER:-shards}                    # for the shards, on storage that all machines share
SHARD=${SHARD:-1000}                        # images per shard; tar shards keep their own number
BATCH=${BATCH:-64}                          # images per batch
WORKERS=${WORKERS:-6}                       # threads that read and decode, for each process
OPTIONS=${OPTIONS:-}                        # further options of `bitvae tokenize`, such as --size 512 --latents
PROCESSES=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}  # processes per machine: one per GPU
PORT=${PORT:-29500}                         # free port of the first machine, for the rendezvous
BITVAE=${BITVAE:-.venv/bin/bitvae}          # the installed command

read -r FIRST < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# srun does not inherit --cpus-per-task. --kill-on-bad-exit stops the other machines when one fails.
# shellcheck disable=SC2086  # IMAGES and OPTIONS are several words
exec srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 "$BITVAE" tokenize "$TOKENIZER" \
  --images $IMAGES --folder "$FOLDER" --per-shard "$SHARD" --batch "$BATCH" --workers "$WORKERS" $OPTIONS \
  --processes "$PROCESSES" --nodes "$SLURM_JOB_NUM_NODES" --rendezvous "$FIRST:$PORT"
