# The other scripts source this file. It makes .venv beside this folder, installs missing packages and puts .venv first on
# PATH. PYTHON chooses the interpreter (default python3); SKIP_INSTALL=1 uses the active environment.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
# Large pages make CPU training about a sixth faster; C libraries other than glibc ignore this.
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}

# fail MESSAGE: end with one line and status 2, as every program here does for a mistake of the user.
fail() {
  echo "error: $1" >&2
  exit 2
}

# install FILE...: install the requirement files, once for each version of their content.
install() {
  [ "${SKIP_INSTALL:-0}" = 1 ] && return
  local python=${PYTHON:-python3} venv="$root/.venv" files=() file wanted
  for file in "$@"; do files+=(-r "$root/$file"); done
  wanted=$(cat "$root/constraints.txt" "${@/#/$root/}" | cksum)
  if [ ! -x "$venv/bin/python" ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
      || fail "Python 3.11 or newer is needed; $python is $("$python" --version). Set PYTHON=..."
    echo "Making $venv"
    "$python" -m venv "$venv"
  fi
  if ! grep -qsxF "$wanted" "$venv/installed"; then
    echo "Installing ${*} (a few minutes, once)"
    "$venv/bin/python" -m pip install --disable-pip-version-check "${files[@]}" -c "$root/constraints.txt"
    echo "$wanted" >>"$venv/installed"
  fi
  export PATH="$venv/bin:$PATH"
}
