#!/usr/bin/env bash
# Post-training quantization with AutoRound itself, from the BF16 stage: bash scripts/ptq_autoround.sh MODEL OUT
# Writes OUT/SCHEME-iters0 (round to nearest) and OUT/SCHEME-iters200 (tuned rounding). vLLM serves both, and main.py starts
# QAT from them (--model_name_or_path OUT/SCHEME-iters200). SCHEME is MXFP4 by default; ITERS="0 200" chooses the variants;
# CALIBRATION is a .jsonl file of {"text": ...} rows, by default python-docs (offline).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
model=$(realpath "${1:?usage: bash scripts/ptq_autoround.sh MODEL OUT}")
mkdir -p "${2:?usage: bash scripts/ptq_autoround.sh MODEL OUT}"
out=$(realpath "$2")
cd "$root"
install requirements.txt

scheme=${SCHEME:-MXFP4}
calibration=${CALIBRATION:-}
if [ -z "$calibration" ]; then
  calibration=$out/calibration.jsonl
  python scripts/tasks/local_data.py "$calibration"
fi

for iters in ${ITERS:-0 200}; do
  folder=$out/$scheme-iters$iters
  if [ -f "$folder/config.json" ]; then
    echo "$folder exists; remove it to make it again"
    continue
  fi
  # AutoRound chooses the name of the model's folder inside its output folder.
  partial=$out/.partial-$scheme-iters$iters
  rm -rf "$partial"
  auto-round --model "$model" --scheme "$scheme" --iters "$iters" --format auto_round --output_dir "$partial" \
    --dataset "$calibration" --seqlen "${SEQLEN:-256}" --nsamples "${NSAMPLES:-128}" ${DEVICE:+--device "$DEVICE"}
  config=$(find "$partial" -name config.json -print -quit)
  mv "$(dirname "$config")" "$folder"
  rm -rf "$partial"
  echo "$folder"
done
