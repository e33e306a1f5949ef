"""Colours, where they are wanted: on a terminal, unless ``NO_COLOR`` or ``TERM=dumb`` says otherwise.

``CLICOLOR_FORCE`` and ``FORCE_COLOR`` want them in a pipe too; ``NO_COLOR`` has the last word (no-color.org).
"""

from __future__ import annotations

import os
from typing import IO, Any

_CODES = {"red": "31", "green": "32", "yellow": "33", "dim": "2", "bold red": "1;31"}
_STATES = {
    "running": "green",
    "creating": "yellow",
    "restoring": "yellow",
    "paused": "yellow",
    "stopped": "dim",
    "dead": "red",
    "failed": "red",
    "lost": "red",
    "exited": "dim",
}


def wanted(stream: IO[Any]) -> bool:
    """Return whether what is written to *stream* may be coloured."""
    if os.environ.get("NO_COLOR"):
        return False
    for name in ("CLICOLOR_FORCE", "FORCE_COLOR"):
        if os.environ.get(name, "0").lower() not in ("", "0", "false"):
            return True
    return os.environ.get("TERM") != "dumb" and stream.isatty()


def painted(text: str, colour: str, stream: IO[Any]) -> str:
    """Return *text* in *colour*, as it is to be written to *stream*."""
    return f"\x1b[{_CODES[colour]}m{text}\x1b[0m" if text and wanted(stream) else text


def state(text: str, stream: IO[Any]) -> str:
    """Return the state of a VM or process, which is the first word of *text*, in its colour."""
    word = text.split(" ", 1)[0]
    colour = "red" if text.endswith("(silent)") else _STATES.get(word)
    return text if colour is None else painted(text, colour, stream)
