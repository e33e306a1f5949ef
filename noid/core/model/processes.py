"""Processes for a guest: what starts one, and what may be asked for. What comes of it is in `guest_processes`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from noid.errors import InvalidRequest

ENV_ENTRIES_MAX = 64
ENV_VALUE_BYTES_MAX = 32768
LOG_BYTES = 1 << 20
LOG_BYTES_MIN = 4096
LOG_BYTES_MAX = 16 << 20
LABEL_BYTES_MAX = 8192
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def checked_env(entries: list[str] | tuple[str, ...]) -> dict[str, str]:
    """Turn ``KEY=VALUE`` entries into a mapping. The last of two entries with one key wins.

    Raises:
        InvalidRequest: too many entries, no ``=``, an invalid name, a value too long or with a NUL.
    """
    if len(entries) > ENV_ENTRIES_MAX:
        raise InvalidRequest(f"too many environment entries: {len(entries)}; at most {ENV_ENTRIES_MAX} are allowed.")
    env: dict[str, str] = {}
    for entry in entries:
        key, equals, value = entry.partition("=")
        if not equals:
            raise InvalidRequest(f"environment entry {key!r} is not in the form KEY=VALUE.")
        if not _ENV_NAME.fullmatch(key):
            raise InvalidRequest(f"invalid environment variable name {key!r}: letters, digits and '_' only.")
        try:
            size = len(value.encode("utf-8", "surrogateescape"))
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the value of {key} contains half a surrogate pair.") from error
        if size > ENV_VALUE_BYTES_MAX:
            raise InvalidRequest(f"the value of {key} is too long; at most {ENV_VALUE_BYTES_MAX} bytes are allowed.")
        if "\0" in value:
            raise InvalidRequest(f"the value of {key} contains a NUL byte, which no environment can hold.")
        env[key] = value
    return env


def checked_argv(argv: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """Return *argv* as a tuple.

    Raises:
        InvalidRequest: it is empty, its program is empty, or an argument contains a NUL.
    """
    if not argv or not argv[0]:
        raise InvalidRequest("command cannot be empty")
    for argument in argv:
        if "\0" in argument:
            raise InvalidRequest("an argument of the command contains a NUL byte, which no program can be given.")
    return tuple(argv)


@dataclass(frozen=True, slots=True, kw_only=True)
class TerminalSize:
    """How large a terminal is, in characters; 0 where nobody knows. Both fit 16 bits."""

    columns: int
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecRequest:
    """A process to start in a guest. *argv* goes to ``execve`` as it is; no shell is involved.

    *user* None means the image's default user; *cwd* None means that user's home, or ``/``. *tty* gives it a terminal
    of that size, and stdout is then all it has. *log_bytes* is how much of its latest output the guest keeps. *label*
    is text of ours, at most `LABEL_BYTES_MAX`, that the guest keeps with the process and gives back.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    cwd: str | None = None
    user: str | None = None
    stdin: bool = False
    timeout_secs: float | None = None
    tty: TerminalSize | None = None
    log_bytes: int = LOG_BYTES
    label: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Bytes of a log, from *start* up to *end*, that nobody has any more."""

    start: int
    end: int
