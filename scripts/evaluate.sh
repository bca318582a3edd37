#!/usr/bin/env bash
# Evaluate folders side by side with lm_eval: bash scripts/evaluate.sh DIR [DIR ...] [--tasks gsm8k] [--backend hf|vllm]
# A folder is a BF16 checkpoint, a QAT folder (evaluated fake-quantized) or a packed one. Tasks that need no network:
# --tasks local_text,python_docs_choice. `--help` lists all arguments; TASKS, BACKEND and BATCH_SIZE set defaults.
set -euo pipefail
exec python "$(dirname "${BASH_SOURCE[0]}")/evaluate.py" "$@"
