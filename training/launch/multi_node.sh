#!/usr/bin/env bash
# One training on several machines that share a file system. The same command on each of them, at about the same time:
#
#     NODES=2 HEAD=node0:29500 training/launch/multi_node.sh --preset 1.3b --teacher TEACHER --data DATA -o RUN
#
# NODES      machines
# HEAD       one of them and a free port there, the same for all
# PROCESSES  processes on each machine; by default one for each GPU
# After a stop or a failure: the same with `--resume -o RUN`, on any number of machines.
set -euo pipefail

# torchrun passes a SIGTERM on and kills after this many seconds, 30 by default: too few to save a large model.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

# No restarts: what ended a run should be read before it goes on.
exec torchrun --nnodes "$NODES" --nproc-per-node "${PROCESSES:-gpu}" --max-restarts 0 \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "${RUN_ID:-fbiedge}" \
    --no-python fbiedge train "$@"
