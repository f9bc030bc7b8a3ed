#!/usr/bin/env bash
# Train on the nodes of a Slurm cluster; goes on by itself after a preemption or a time limit.
#
#   sbatch --nodes=4 --gpus-per-node=8 scripts/slurm.sh +experiment=nsa_64k parallel=zero1
#
# The arguments are train/pretrain.py's. One task a node starts torchrun, which starts a process a GPU.
# Two minutes before the time limit, and at a preemption, every rank saves and leaves, and the job is
# put back into the queue under its own number. train.resume=auto picks up the newest checkpoint, so
# output_dir must lie on a disk that all nodes share.
#SBATCH --job-name=nsa-lm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?is set by sbatch: submit this script with sbatch}"
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PYTHON=${PYTHON:-.venv/bin/python}

# srun passes the signal on to torchrun, torchrun to its ranks, which save and leave.
leaving=0
leave() {
  leaving=1
  echo "signal received: saving, then back into the queue"
  kill -TERM "$steps"
}
trap leave USR1 TERM

# --kill-on-bad-exit: a node that is lost ends the step everywhere instead of hanging it.
srun --kill-on-bad-exit=1 "$PYTHON" -m torch.distributed.run \
  --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" \
  --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$MASTER:29500" \
  train/pretrain.py "$@" train.resume=auto &
steps=$!

status=0
wait "$steps" || status=$?
if ((leaving)); then
  wait "$steps" || true  # the first wait ends with the trap; this one with the processes
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
