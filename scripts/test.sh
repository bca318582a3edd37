#!/usr/bin/env bash
# Make the environment, run the linter, the type checker and the tests. Arguments go to pytest: bash scripts/test.sh -k formats
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
install requirements.txt tests/requirements.txt
ruff check .
ruff format --check .
mypy
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 python -m pytest tests --numprocesses 2 --dist loadfile "$@"
