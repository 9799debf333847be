#!/usr/bin/env bash
# Evaluate a tokenizer on several machines with Slurm: one command per machine, which starts torchrun there.
#
#     sbatch examples/slurm-evaluate.sh                                  # with the defaults below
#     TOKENIZER=runs/d32 IMAGES=/data/val.txt METRICS="psnr lpips fid" sbatch --nodes 2 examples/slurm-evaluate.sh
#
# Each image is evaluated once, and the results do not depend on the number of machines. Submit the same command
# again to resume from the partial results; Slurm resumes after a preemption (--requeue).

#SBATCH --job-name=bitvae-evaluate
#SBATCH --nodes=2                # machines
#SBATCH --gpus-per-node=8        # GPUs per machine; one process per GPU
#SBATCH --ntasks-per-node=1      # one command per machine; torchrun starts the processes
#SBATCH --cpus-per-task=64       # cores per machine, for the processes and those that read images
#SBATCH --time=08:00:00          # time limit; submit again to resume
#SBATCH --requeue                # queue again after a preemption or a machine failure
#SBATCH --output=%x-%j.out       # output of all machines

set -euo pipefail

TOKENIZER=${TOKENIZER:-demo}                # a folder, a checkpoint, or a name
IMAGES=${IMAGES:-held-out}                  # folder, list (.txt), 'held-out' or 'bundled'; several, with spaces
FOLDER=${FOLDER:-evaluation}                # for metrics.json and partial results, on storage that all machines share
PROTOCOLS=${PROTOCOLS:-clamped}             # of bitvae.protocols.PROTOCOLS; several, with spaces
METRICS=${METRICS:-psnr ssim}               # of bitvae.protocols.METRICS; several, with spaces
BATCH=${BATCH:-16}                          # images at a time
WORKERS=${WORKERS:-4}                       # processes that read images, for each one that evaluates
OPTIONS=${OPTIONS:-}                        # further options of `bitvae evaluate`, such as --budgets 0.25M --no-prefixes
PROCESSES=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}  # processes per machine: one per GPU
PORT=${PORT:-29500}                         # free port of the first machine, for the rendezvous
BITVAE=${BITVAE:-.venv/bin/bitvae}          # the installed command

read -r FIRST < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# srun does not inherit --cpus-per-task. --kill-on-bad-exit stops the other machines when one fails.
# shellcheck disable=SC2086  # some variables are several words
exec srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 "$BITVAE" evaluate "$TOKENIZER" \
  --images $IMAGES --folder "$FOLDER" --protocols $PROTOCOLS --metrics $METRICS --batch "$BATCH" \
  --workers "$WORKERS" $OPTIONS \
  --processes "$PROCESSES" --nodes "$SLURM_JOB_NUM_NODES" --rendezvous "$FIRST:$PORT"
