#!/usr/bin/env bash
# Stage 1: fine-tune in BF16. Settings are environment variables; further arguments are main.py's own and win.
#   MODEL=Qwen/Qwen3-8B bash scripts/finetune_bf16.sh --learning_rate 2e-5
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

accelerate launch --config_file "${ACCELERATE_CONFIG:-accelerate_config/fsdp2.yaml}" main.py \
  --model_name_or_path "${MODEL:-meta-llama/Llama-3.1-8B}" \
  --output_dir "${OUTPUT_DIR:-llama3.1-finetuned}" \
  --dataset "${DATASET:-Daring-Anteater}" \
  --model_max_length 4096 \
  --do_train True \
  --do_eval True \
  --num_train_epochs 2.0 \
  --per_device_train_batch_size 4 \
  --per_device_eval_batch_size 4 \
  --gradient_accumulation_steps 1 \
  --learning_rate 1e-5 \
  --weight_decay 0.0 \
  --warmup_steps 0.1 \
  --lr_scheduler_type linear \
  --eval_strategy steps \
  --eval_steps 3000 \
  --save_strategy steps \
  --save_steps 3000 \
  --save_total_limit 2 \
  --load_best_model_at_end True \
  --logging_steps 1 \
  --report_to tensorboard \
  "$@"
