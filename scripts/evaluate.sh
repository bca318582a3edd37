#!/usr/bin/env bash
# Evaluate a saved model with lm_eval: bash scripts/evaluate.sh DIR [lm_eval arguments, which win]
# BACKEND is vllm (default where it is installed) or hf; TASKS is gsm8k by default.
set -euo pipefail
model=${1:?usage: bash scripts/evaluate.sh DIR [lm_eval arguments]}
shift
if [ -z "${BACKEND:-}" ]; then
  BACKEND=hf
  python -c 'import vllm' 2>/dev/null && BACKEND=vllm
fi
arguments="pretrained=$model,dtype=bfloat16"
[ "$BACKEND" = vllm ] && arguments="$arguments,gpu_memory_utilization=0.8,max_model_len=4096"
lm_eval run --model "$BACKEND" --model_args "$arguments" --tasks "${TASKS:-gsm8k}" --batch_size "${BATCH_SIZE:-8}" "$@"
