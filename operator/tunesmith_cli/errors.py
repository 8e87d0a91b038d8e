"""How the command line refuses: lines for people and an exit code, never a traceback."""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith_api.keys import ExitCode

__all__ = ["Refused"]


class Refused(Exception):
    """The command can't do what it was asked for. Printed by `__main__`, one line for each fault."""

    def __init__(self, *lines: str, code: int = ExitCode.INVALID_INPUT) -> None:
        super().__init__("\n".join(lines))
        self.lines: Sequence[str] = lines
        self.code = int(code)
