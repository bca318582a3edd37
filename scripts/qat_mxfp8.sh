#!/usr/bin/env bash
# Quantization-aware training in MXFP8; see qat.sh for the settings.
SCHEME=MXFP8 exec bash "$(dirname "${BASH_SOURCE[0]}")/qat.sh" "$@"
