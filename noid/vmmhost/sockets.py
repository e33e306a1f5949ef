"""Connecting to a socket in a directory that somebody less trusted writes to."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def socket_itself(path: Path) -> Iterator[str]:
    """Yield a name to connect to for the socket *path*, and for no other that a link in its place might name.

    Raises:
        ConnectionRefusedError: it is no socket.
        FileNotFoundError: there is none.
    """
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise ConnectionRefusedError(f"{path} is no socket")
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)
