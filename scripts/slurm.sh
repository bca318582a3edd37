#!/usr/bin/env bash
# Train on several machines of a Slurm cluster. Each machine runs one launcher; they meet at the first machine (elastic
# torchrun rendezvous). Arguments are main.py's own:
#   sbatch --nodes 4 --gpus-per-node 8 scripts/slurm.sh --model_name_or_path M --quant_scheme MXFP4 --do_train True ...
# Without Slurm, run on every machine: NNODES=2 MAIN_ADDRESS=host1 bash scripts/slurm.sh ... (docs/distributed.md).
#SBATCH --job-name=mx-qat
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --output=%x-%j.log
set -euo pipefail

nodes=${SLURM_NNODES:-${NNODES:-1}}
gpus=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)}}
if ! [ "$nodes" -ge 1 ] 2>/dev/null || ! [ "$gpus" -ge 1 ] 2>/dev/null; then
  echo "error: NNODES '$nodes' and GPUS_PER_NODE '$gpus' are not both whole numbers of at least 1; set them" >&2
  exit 2
fi
port=${MAIN_PORT:-$((20000 + ${SLURM_JOB_ID:-9500} % 20000))}
address=${MAIN_ADDRESS:-}
if [ -z "$address" ] && [ -n "${SLURM_JOB_NODELIST:-}" ]; then
  address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
fi
address=${address:-localhost}
# Slurm runs a copy of this file from its spool; the repository is where the job was submitted.
cd "${REPOSITORY:-${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8} TOKENIZERS_PARALLELISM=false

launch=(accelerate launch --config_file "${ACCELERATE_CONFIG:-accelerate_config/multi_node.yaml}"
  --num_machines "$nodes" --num_processes "$((nodes * gpus))"
  --main_process_ip "$address" --main_process_port "$port" --machine_rank "${MACHINE_RANK:-0}"
  --max_restarts "${MAX_RESTARTS:-0}" "${MAIN:-main.py}" "$@")
if [ -n "${SLURM_JOB_ID:-}" ]; then
  exec srun --ntasks "$nodes" --ntasks-per-node 1 --kill-on-bad-exit=1 "${launch[@]}"
fi
exec "${launch[@]}"
