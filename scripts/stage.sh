#!/usr/bin/env bash
# Run one stage with a recipe: RECIPE=mxfp4 bash scripts/stage.sh [main.py's arguments, which override the recipe]. MODEL,
# OUTPUT_DIR and DATASET override the recipe's; ACCELERATE_CONFIG is accelerate's configuration file (default: fsdp2.yaml).
# finetune_bf16.sh, qat_mxfp4.sh, qat_mxfp4_lora.sh and qat_mxfp8.sh call this script with their recipes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
recipe=recipes/${RECIPE:-}.yaml
if [ ! -f "$recipe" ]; then
  echo "error: RECIPE '${RECIPE:-}' is no recipe; choose one of $(cd recipes && echo *.yaml | sed 's/\.yaml//g')" >&2
  exit 2
fi

exec accelerate launch --quiet --config_file "${ACCELERATE_CONFIG:-accelerate_config/fsdp2.yaml}" main.py --config "$recipe" \
  ${MODEL:+--model_name_or_path "$MODEL"} ${OUTPUT_DIR:+--output_dir "$OUTPUT_DIR"} ${DATASET:+--dataset "$DATASET"} "$@"
