#!/usr/bin/env bash
# Post-training quantization with AutoRound itself, from the BF16 stage: bash scripts/ptq_autoround.sh MODEL OUT
# Writes OUT/SCHEME-iters0 (round to nearest) and OUT/SCHEME-iters200 (tuned rounding). vLLM serves both, and main.py starts
# QAT from them (--model_name_or_path OUT/SCHEME-iters200). SCHEME is MXFP4 by default; ITERS="0 200" chooses the variants;
# CALIBRATION is a .jsonl file of {"text": ...} rows, by default python-docs (offline).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
scheme=${SCHEME:-MXFP4}
calibration=${CALIBRATION:-}
[ $# = 2 ] || fail "give two words, the model's folder and the folder to write to: bash scripts/ptq_autoround.sh MODEL OUT"
[ -f "$1/config.json" ] || fail "MODEL '$1' is not the folder of a Hugging Face model: it has no config.json"
[ -z "$calibration" ] || [ -f "$calibration" ] || fail "CALIBRATION '$calibration' is not a file; give one of JSON lines"
for iters in ${ITERS:-0 200}; do
  case $iters in *[!0-9]*) fail "ITERS '$iters' is not a whole number; give such as ITERS=\"0 200\"" ;; esac
done
mkdir -p "$2" || fail "OUT '$2' cannot be made; give a folder that can"
model=$(realpath "$1")
out=$(realpath "$2")
calibration=${calibration:+$(realpath "$calibration")}
cd "$root"
install requirements.txt

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
