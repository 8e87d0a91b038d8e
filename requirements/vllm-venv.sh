#!/usr/bin/env bash
# Makes vLLM's environment once per lock content, outside the checkout, and prints its path. It is none of the development
# environment's: the two want other versions of transformers. Called by `make vllm` and `make vllm-image`.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${TUNESMITH_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/tunesmith}
wheels=${TUNESMITH_WHEELS:-$here/../../shared/wheels}
tools=$("$here/venv.sh")/bin

locks=("$here/vllm.txt")
build=''
if compgen -G "$wheels/torch-*+cpu-*.whl" >/dev/null; then build=+cpu; else locks+=("$here/cuda.txt"); fi
key=$(cat "${locks[@]}" "$0" | cat - <("$tools/python" -VV) | sha256sum | cut -c1-16)
venv=$cache/vllm-$key
mkdir -p "$cache"
exec 9>"$cache/vllm.lock"; flock 9
if [ ! -e "$venv/.complete" ]; then
  echo "installing vLLM's environment into $venv (once per lock file)" >&2
  rm -rf "$cache"/vllm-????????????????
  "$tools/uv" venv --quiet --python "$tools/python" "$venv" >&2
  find=(); [ -d "$wheels" ] && find=(--find-links "$wheels")
  for lock in "${locks[@]}"; do
    "$tools/uv" pip install --quiet --python "$venv/bin/python" --no-deps --require-hashes --compile-bytecode "${find[@]}" \
      --requirement <(sed "s/^torch==[0-9.]*/&$build/" "$lock") >&2
  done
  touch "$venv/.complete"
fi
echo "$venv"
