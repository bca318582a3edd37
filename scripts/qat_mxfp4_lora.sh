#!/usr/bin/env bash
# Stage 2: adapters trained in MXFP4 with recipes/mxfp4-lora.yaml; see stage.sh for the settings.
RECIPE=mxfp4-lora exec bash "$(dirname "${BASH_SOURCE[0]}")/stage.sh" "$@"
