#!/usr/bin/env bash
# Stage 2: quantization-aware training in MXFP4 with recipes/mxfp4.yaml; see stage.sh for the settings.
RECIPE=mxfp4 exec bash "$(dirname "${BASH_SOURCE[0]}")/stage.sh" "$@"
