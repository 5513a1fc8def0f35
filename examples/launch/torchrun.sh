#!/usr/bin/env bash
# A run on several machines by torchrun. On each: bash torchrun.sh HEAD
# HEAD is the name or address of the first machine, as all of them reach it; localhost for one.
# Four lines to edit:
NODES=2         # machines
GPUS=8          # of each
CONFIG=run.yaml # further options of `pacatune train`, such as --reward, go to the last line
RESTARTS=3      # how often all processes are started again when one has died

# An optimizer step has NODES x GPUS x per_device_train_batch_size x gradient_accumulation_steps
# examples. Model, data and this configuration have the same paths on every machine; for restarts
# they share the disk of training.output_dir. Without checkpoints (training.save_strategy: no), a
# restart begins anew. Without restarts, drop --auto_resume.
# Weights sharded over all GPUs: fsdp2.yaml or zero3.yaml, by accelerate.
set -euo pipefail
HEAD=${1:?name the first machine: bash torchrun.sh HEAD}
PORT=${PORT:-29500}
# Otherwise torchrun starts processes again in the store of those that died, with their addresses.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" --max-restarts "$RESTARTS" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-id pacatune \
  -m pacatune train --config "$CONFIG" --auto_resume
