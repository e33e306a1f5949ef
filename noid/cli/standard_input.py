"""Whether our standard input is meant for a guest's command that nobody said ``-i`` for.

``tar c | noid exec web -- tar x`` is: the pipe was made for us. ``noid list -q | while read vm; do noid exec $vm ...``
is not: the loop reads its list there, and reading ahead, as ssh does, would silently eat it. What tells them apart is
whether those who started us have the same standard input.
"""

from __future__ import annotations

import array
import fcntl
import os
import stat
import termios

STDIN_FD = 0
ANCESTORS_MAX = 16
PASSING_ON = frozenset(
    ("sudo", "su", "doas", "runuser", "timeout", "time", "strace", "ltrace", "uv", "uvx", "pipx", "systemd-run", "tini")
)
"""Programs that start another one, hand their standard input on to it and read none of it."""


def is_meant_for_us() -> bool:
    """Return whether it is a pipe, a socket or a file at its beginning that nobody reads but us."""
    try:
        status = os.fstat(STDIN_FD)
        if stat.S_ISREG(status.st_mode):
            return os.lseek(STDIN_FD, 0, os.SEEK_CUR) == 0
    except OSError:
        return False
    return (stat.S_ISFIFO(status.st_mode) or stat.S_ISSOCK(status.st_mode)) and not _is_read_above(status)


def has_waiting() -> bool:
    """Return whether something waits in it that may have been meant for us: only then is leaving it worth a word."""
    try:
        status = os.fstat(STDIN_FD)
        if stat.S_ISREG(status.st_mode):
            return os.lseek(STDIN_FD, 0, os.SEEK_CUR) < status.st_size
        if not (stat.S_ISFIFO(status.st_mode) or stat.S_ISSOCK(status.st_mode)):
            return False
        count = array.array("i", [0])
        fcntl.ioctl(STDIN_FD, termios.FIONREAD, count)
    except OSError:
        return False
    return count[0] > 0


def _is_read_above(ours: os.stat_result) -> bool:
    """Return whether who started us has the same input and may read it: a shell's loop, a script.

    Where that cannot be seen (another user's process, no ``/proc``) it is taken for ours alone.
    """
    process = os.getppid()
    for _ in range(ANCESTORS_MAX):
        try:
            theirs = os.stat(f"/proc/{process}/fd/{STDIN_FD}")  # noqa: PTH116  # every exec would import pathlib
            with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:  # noqa: PTH123  # the same
                before, _, behind = file.read().rpartition(")")
        except OSError:
            return False
        if (theirs.st_dev, theirs.st_ino) != (ours.st_dev, ours.st_ino):
            return False
        if before.partition("(")[2] not in PASSING_ON:
            return True
        process = int(behind.split()[1])
    return False
