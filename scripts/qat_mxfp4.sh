#!/usr/bin/env bash
# Quantization-aware training in MXFP4; see qat.sh for the settings.
SCHEME=MXFP4 exec bash "$(dirname "${BASH_SOURCE[0]}")/qat.sh" "$@"
