#!/usr/bin/env bash
# A run on several nodes of a Slurm cluster: sbatch slurm.sh, from the environment that has pacatune.
# Account, time and the like: as options of sbatch (sbatch --time 8:00:00 slurm.sh).
#SBATCH --job-name=pacatune
#SBATCH --output=%x-%j.log
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
# Four lines to edit:
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --partition=gpu
CONFIG=run.yaml # further options of `pacatune train`, such as --reward, go to the last line

# An optimizer step has nodes x GPUs x per_device_train_batch_size x gradient_accumulation_steps
# examples. Model, data, this configuration and training.output_dir lie on a disk that all nodes
# share. When a process has died, all are started again, up to three times, from the last checkpoint;
# without checkpoints (training.save_strategy: no), the run begins anew.
# Weights sharded over all GPUs: fsdp2.yaml or zero3.yaml, by srun bash -c 'accelerate launch ...',
# with --machine_rank "$SLURM_NODEID" --main_process_ip "$HEAD" --main_process_port "$PORT".
set -euo pipefail
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
PORT=$((20000 + SLURM_JOB_ID % 10000)) # two jobs may share a node
export HEAD PORT
# Otherwise torchrun starts processes again in the store of those that died, with their addresses.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-id "$SLURM_JOB_ID" \
  -m pacatune train --config "$CONFIG" --auto_resume
