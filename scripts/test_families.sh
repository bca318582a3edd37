#!/usr/bin/env bash
# Sweep over every causal family of transformers, one tiny model each: some minutes on one core. Arguments go to
# tests/families/run.py: bash scripts/test_families.sh mixtral --keep DIR. docs/architectures.md has the results.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
install requirements.txt tests/requirements.txt
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 python tests/families/run.py "$@"
