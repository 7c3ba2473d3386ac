#!/bin/bash
# What a scheduler starts once on each machine: torchrun, which starts a process a GPU and waits for the others.
#
#   RENDEZVOUS=first-machine:29500 RUN_ID=any NODES=2 config/cluster/run.sh [config ...] [--key=value ...]
#
# A job that is started again goes on with the run that OUT_DIR holds. Machines share OUT_DIR and the corpus.
set -euo pipefail

: "${RENDEZVOUS:?is host:port of one of the machines, the same on all}"
: "${RUN_ID:?is a name that the machines of this run share}"
NODES=${NODES:-1}              # machines
PROCESSES=${PROCESSES:-8}      # on each: GPUs
RESTARTS=${RESTARTS:-3}        # how often all processes are started again when one of them fails
OUT_DIR=${OUT_DIR:-out/gpt2}
PYTHON=${PYTHON:-.venv/bin/python}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100} # seconds to save in, when told to stop

if [ $# -eq 0 ]; then
  set -- config/train_gpt2.py --parallel=fsdp
fi
set -- "$@" --out_dir="$OUT_DIR"
if compgen -G "$OUT_DIR/step-*" > /dev/null; then
  set -- "$@" --init_from=resume
elif [ -e "$OUT_DIR/settings.json" ]; then
  set -- "$@" --overwrite=True # it was stopped before its first checkpoint: there is nothing to lose
fi

"$PYTHON" train.py "$@" --print_settings > /dev/null # a mistake is told once, and not by every process
exec "$PYTHON" -m torch.distributed.run --nnodes="$NODES" --nproc_per_node="$PROCESSES" \
  --rdzv_backend=c10d --rdzv_endpoint="$RENDEZVOUS" --rdzv_id="$RUN_ID" --max_restarts="$RESTARTS" \
  train.py "$@"
