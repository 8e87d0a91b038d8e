#!/usr/bin/env bash
# Makes the development environment once per lock content, outside the checkout, and prints its path.
# Called by the Makefile before every target. Works on a bare machine with Python 3.11 or newer.
# `venv.sh --made` makes nothing: it prints the path where the environment is there, else nothing. Called by .ci/run.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${TUNESMITH_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/tunesmith}
wheels=${TUNESMITH_WHEELS:-$here/../../shared/wheels}
python=$(command -v python3.11 || command -v python3) || {
  echo "python3 is missing: install Python 3.11 or newer (Debian: apt-get install python3 python3-venv)" >&2; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "$python is older than 3.11: install a newer Python" >&2; exit 1; }

locks=("$here/dev.txt" "$here/data.txt")
build=''
if compgen -G "$wheels/torch-*+cpu-*.whl" >/dev/null; then build=+cpu; else locks+=("$here/cuda.txt"); fi
key=$(cat "${locks[@]}" "$0" | cat - <("$python" -VV) | sha256sum | cut -c1-16)
venv=$cache/venv-$key
if [ "${1:-}" = --made ]; then
  [ ! -e "$venv/.complete" ] || echo "$venv"
  exit 0
fi
mkdir -p "$cache"
exec 9>"$cache/venv.lock"; flock 9
if [ ! -e "$venv/.complete" ]; then
  echo "installing the development environment into $venv (once per lock file)" >&2
  rm -rf "$venv"
  if ! "$python" -m venv "$venv" >/dev/null 2>&1; then
    rm -rf "$venv"
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || {
      echo "this Python has no venv module: apt-get install python3-venv" >&2; exit 1; }
    apt-get update -qq >&2 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv >&2
    "$python" -m venv "$venv"
  fi
  "$venv/bin/pip" install --quiet --disable-pip-version-check uv >&2
  find=(); [ -d "$wheels" ] && find=(--find-links "$wheels")
  # byte code now: where nobody may write it later (PYTHONDONTWRITEBYTECODE), every process compiles transformers anew, 10 s of CPU
  for lock in "${locks[@]}"; do # the local version +cpu is a build of the locked release; its hash is in the lock
    "$venv/bin/uv" pip install --python "$venv/bin/python" --no-deps --require-hashes --compile-bytecode "${find[@]}" \
      --requirement <(sed "s/^torch==[0-9.]*/&$build/" "$lock") >&2
  done
  touch "$venv/.complete"
fi
ln -sfn "$venv" "$cache/venv"
echo "$venv"
