#!/usr/bin/env bash
# Stage 2: quantization-aware training in MXFP8 with recipes/mxfp8.yaml; see stage.sh for the settings.
RECIPE=mxfp8 exec bash "$(dirname "${BASH_SOURCE[0]}")/stage.sh" "$@"
