#!/usr/bin/env bash
# Installs transformers 4.57 into a folder of its own, once per lock content, and prints its path: put before the
# development environment on PYTHONPATH, it takes the place of transformers 5. Called by `make transformers-4`.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${TUNESMITH_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/tunesmith}
tools=$("$here/venv.sh")/bin

key=$(cat "$here/transformers-4.txt" "$0" | cat - <("$tools/python" -VV) | sha256sum | cut -c1-16)
folder=$cache/transformers-4-$key
mkdir -p "$cache"
exec 9>"$cache/transformers-4.lock"; flock 9
if [ ! -e "$folder/.complete" ]; then
  echo "installing transformers 4.57 into $folder (once per lock file)" >&2
  rm -rf "$cache"/transformers-4-????????????????
  "$tools/uv" pip install --quiet --python "$tools/python" --target "$folder" --no-deps --require-hashes \
    --requirement "$here/transformers-4.txt" >&2
  touch "$folder/.complete"
fi
echo "$folder"
