#!/usr/bin/env bash
# One training under Slurm, a task for each GPU, which goes on by itself where its time limit cut it:
#
#     sbatch --nodes 4 training/launch/slurm.sh --preset 7b --teacher TEACHER --data DATA -o RUN
#
#SBATCH --job-name=fbiedge
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

# Ten minutes before the limit every task gets a SIGTERM, saves and exits with 130. There is no torchrun in between, which
# would wait for 30 seconds only.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # from Slurm 22.05 on, srun does not take it from the job by itself

run=
previous=
for argument in "$@"; do
    case $previous in -o | --out) run=$argument ;; esac
    previous=$argument
done
: "${run:?the arguments need -o RUN}"
if [[ -e $run/run.json ]]; then
    set -- --resume -o "$run"
fi

code=0
srun --kill-on-bad-exit=1 bash -c '
    RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID exec fbiedge train "$@"' fbiedge "$@" || code=$?
if [[ $code -eq 130 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
elif [[ $code -eq 143 ]]; then
    # Queued again, texts would be read from their start, and cut again. Amber's finished chunks stay.
    echo "the time limit came while the data were prepared; do that once, alone: python -m fbiedge.training.corpus --help" >&2
fi
exit "$code"
