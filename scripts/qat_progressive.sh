#!/usr/bin/env bash
# Quantization-aware training in two stages: first MXFP8, then MXFP4 from the saved MXFP8 model. Settings are those of
# stage.sh; the stages write to OUTPUT_DIR/MXFP8 and OUTPUT_DIR/MXFP4. FIRST_STEPS (250) and STEPS (the recipe's) are their
# lengths; further arguments go to both. The teacher of both stages is MODEL, unquantized. The second stage has samples of
# the teacher: where its recipe asks for --distill_generic none (see there), give it here, or the first trains in vain.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
model=${MODEL:-llama3.1-finetuned}
out=${OUTPUT_DIR:-llama3.1-finetuned-qat-progressive}

MODEL=$model OUTPUT_DIR=$out/MXFP8 bash "$here/qat_mxfp8.sh" \
  --max_steps "${FIRST_STEPS:-250}" --export_format none --teacher_model_name_or_path "$model" "$@"
MODEL=$out/MXFP8 OUTPUT_DIR=$out/MXFP4 bash "$here/qat_mxfp4.sh" \
  ${STEPS:+--max_steps "$STEPS"} --teacher_model_name_or_path "$model" "$@"
