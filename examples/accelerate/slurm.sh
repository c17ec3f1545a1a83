#!/bin/bash
# Four nodes of eight GPUs under Slurm, with torchrun; a preempted job goes back to the queue and goes on where it was:
#   sbatch examples/accelerate/slurm.sh --config examples/configs/sit-xl-2_256_srepa-mse.yaml --output_dir runs/xl
#SBATCH --job-name=srepa
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Two minutes before the time is up every process gets SIGTERM: the run saves and ends with code 75.
#SBATCH --signal=TERM@120
set -uo pipefail

# torchrun kills its processes half a minute after it has passed a signal on, unless told otherwise.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110
STARTED=$(mktemp)

ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$ADDRESS:29500" \
    examples/train_srepa.py "$@" --resume_from_checkpoint latest --expected_processes $((SLURM_NNODES * 8))
STATUS=$?

# torchrun ends with 1 whatever its processes ended with; the run is finished when its pipeline is there, and is not
# one that an earlier, shorter run has left.
OUTPUT=$(sed -n 's/.*--output_dir[ =]\([^ ]*\).*/\1/p' <<< "$*")
if [ "$STATUS" -ne 0 ] && [ ! "$OUTPUT/model_index.json" -nt "$STARTED" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$STATUS"
