"""`python -m suite.housemap --write | --check`: draw the house, or fail where the picture isn't of the code as it is."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from suite.housemap.drawing import draw
from suite.housemap.graph import Circle, read_house

ROOT = Path(__file__).resolve().parents[3]
PICTURE = "docs/images/house.svg"


def main() -> int:
    """Parse arguments, compare or write, and return the exit status."""
    parser = argparse.ArgumentParser(prog="suite.housemap", description=__doc__)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", action="store_true", help="write the picture")
    mode.add_argument("--check", action="store_true", help="exit 1 where it differs")
    arguments = parser.parse_args()
    try:
        picture = draw(read_house(ROOT))
    except Circle as circle:
        print(f"house: no room of these lies above the others: {circle}", file=sys.stderr)
        return 1
    path = ROOT / PICTURE
    if path.is_file() and path.read_text() == picture:
        print(f"{PICTURE} shows the code")
    elif arguments.write:
        path.write_text(picture)
        print(f"{PICTURE} written")
    else:
        print(f"out of date, run `make generate` and commit the result: {PICTURE}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
