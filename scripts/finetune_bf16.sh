#!/usr/bin/env bash
# Stage 1: fine-tune in BF16 with recipes/bf16.yaml. MODEL, OUTPUT_DIR, DATASET and ACCELERATE_CONFIG are environment
# variables; further arguments are main.py's own and override the recipe.
#   MODEL=Qwen/Qwen3-8B bash scripts/finetune_bf16.sh --learning_rate 2e-5
set -euo pipefail
RECIPE=bf16 exec bash "$(dirname "${BASH_SOURCE[0]}")/stage.sh" "$@"
