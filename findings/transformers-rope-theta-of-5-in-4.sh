#!/usr/bin/env bash
# transformers 5.23.0 and 4.57.6, rope_theta: a model that 5 has saved runs in 4 with other positions, and nothing is said.
#
# One would guess: config.json of a Llama or Qwen means the same to both: 4.57 is the last of its line, and vLLM, servers and
#   notebooks that pin it read what was fine-tuned with 5. What one of them doesn't know it would refuse or warn of.
# What happens: 5 writes the base of the rotary embedding as rope_parameters.rope_theta and nowhere else; 4 looks for rope_theta at
#   the top, finds none, and takes 10000. A model of 1000000 (most of today's) loads with all its weights and answers worse, the
#   longer the text the more. Scaling ("linear", "yarn", "llama3") is lost in the same way: 4 calls it rope_scaling.
# Seen: 1000000.0 and a linear factor of 4.0 saved by 5; read by 4: 10000.0 and no scaling, exit status 0, no warning of it.
# What follows: a model made for others to load has both: add rope_theta and rope_scaling at the top of config.json after
#   save_pretrained. 5 reads such a file as it reads its own.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/five"
"$work/five/bin/pip" install --quiet transformers==5.23.0
python3 -m venv "$work/four"
"$work/four/bin/pip" install --quiet transformers==4.57.6
export TRANSFORMERS_VERBOSITY=warning
"$work/five/bin/python" - "$work" <<'PYTHON'
import sys

from transformers import LlamaConfig, Qwen2Config

ROPE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000000.0}
for kind, of in (("llama", LlamaConfig), ("qwen2", Qwen2Config)):
    of(hidden_size=64, num_attention_heads=4, num_key_value_heads=4, rope_parameters=ROPE).save_pretrained(f"{sys.argv[1]}/{kind}")
PYTHON
cat > "$work/read.py" <<'PYTHON'
import json
import sys
from pathlib import Path

from transformers import AutoConfig, __version__

for kind in ("llama", "qwen2"):
    folder = Path(sys.argv[1]) / kind
    config = AutoConfig.from_pretrained(folder)
    new = config.rope_parameters if __version__.startswith("5.") else None  # 4 keeps it as a name that it doesn't know
    found = (new["rope_theta"], new["factor"]) if new else (config.rope_theta, config.rope_scaling)
    print(f"{kind}, read by {__version__}: {found}")
    stored = json.loads((folder / "config.json").read_text())
    if sys.argv[2] == "new":
        assert found == ((1000000.0, 4.0) if new else (10000.0, None)), "it is read alike by now"
        old = {name: value for name, value in stored["rope_parameters"].items() if name != "rope_theta"}
        both = stored | {"rope_theta": stored["rope_parameters"]["rope_theta"], "rope_scaling": old}
        (Path(sys.argv[1]) / f"{kind}.json").write_text(json.dumps(both))
    else:
        theta = new["rope_theta"] if new else config.rope_theta
        factor = new["factor"] if new else config.rope_scaling["factor"]
        assert (theta, factor) == (1000000.0, 4.0), "both names don't help"
PYTHON
for reader in five four; do "$work/$reader/bin/python" "$work/read.py" "$work" new; done
for kind in llama qwen2; do mv "$work/$kind.json" "$work/$kind/config.json"; done
echo "with both names:"
for reader in five four; do "$work/$reader/bin/python" "$work/read.py" "$work" both; done
