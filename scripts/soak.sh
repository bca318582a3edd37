#!/usr/bin/env bash
# Inject faults into training runs of a tiny model and resume them: bash scripts/soak.sh 25 [--seed 0]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
install requirements.txt tests/requirements.txt
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 python tests/faults/soak.py "$@"
