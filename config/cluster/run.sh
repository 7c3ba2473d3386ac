#!/bin/bash
# Started by a scheduler once on each machine: torchrun, with one process per GPU.
#
#   RENDEZVOUS=first-machine:29500 RUN_ID=any NODES=2 config/cluster/run.sh [config ...] [--key=value ...]
#
# A restarted job resumes the run in OUT_DIR. All machines share OUT_DIR and the corpus.
set -euo pipefail

: "${RENDEZVOUS:?set it to host:port of one machine, the same on all machines}"
: "${RUN_ID:?set it to a name for this run, the same on all machines}"
NODES=${NODES:-1}              # number of machines
PROCESSES=${PROCESSES:-8}      # per machine: number of GPUs
RESTARTS=${RESTARTS:-3}        # how often torchrun restarts all processes after one fails
OUT_DIR=${OUT_DIR:-out/gpt2}
PYTHON=${PYTHON:-.venv/bin/python}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100} # seconds to save a checkpoint after SIGTERM

if [ $# -eq 0 ]; then
  set -- config/train_gpt2.py --parallel=fsdp
fi
set -- "$@" --out_dir="$OUT_DIR"
if compgen -G "$OUT_DIR/step-*" > /dev/null; then
  set -- "$@" --init_from=resume
elif [ -e "$OUT_DIR/settings.json" ]; then
  set -- "$@" --overwrite=True # stopped before its first checkpoint: nothing to resume
fi

"$PYTHON" train.py "$@" --print_settings > /dev/null # report invalid settings once, not in every process
exec "$PYTHON" -m torch.distributed.run --nnodes="$NODES" --nproc_per_node="$PROCESSES" \
  --rdzv_backend=c10d --rdzv_endpoint="$RENDEZVOUS" --rdzv_id="$RUN_ID" --max_restarts="$RESTARTS" \
  train.py "$@"
