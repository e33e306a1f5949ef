"""What the simulated guest understands of a shell's language. Standard library only."""

from __future__ import annotations

import shlex
from typing import Any


def parse(script: str) -> list[list[Any]]:
    """Return the commands of a shell script as ``[argv, "&&" or None, redirection or None]``."""
    lexer = shlex.shlex(script.replace("\n", ";"), posix=True, punctuation_chars=";&|<>")
    lexer.whitespace_split = True
    commands: list[list[Any]] = []
    argv: list[str] = []
    condition = target = redirect = None
    for word in [*lexer, ";"]:
        if word in (";", "&&"):
            if argv:
                commands.append([argv, condition, target])
            argv, condition, target = [], word if word == "&&" else None, None
        elif word in (">", ">>", ">&"):
            redirect = word
        elif redirect:
            target = {">": "", ">>": "+", ">&": "&"}[redirect] + word
            redirect = None
        else:
            argv.append(word)
    return commands
