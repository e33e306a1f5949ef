"""Keeps a guest from filling the host's disk through its serial console.

A VMM appends to the file for ever. So the middle of a long one is given back to the disk by punching a hole: offsets
stay what they were for whoever follows the file, the hole tells them what is gone, and the VMM never notices.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from noid.errors import BackendError
from noid.hostfs import os_errors

OCCUPIED_BYTES_MAX = 2 << 20
BEGINNING_BYTES = 64 << 10
END_BYTES = 1 << 20
_ALIGNMENT_BYTES = 64 << 10  # of every file system's blocks: half of one would become zeros, which nobody can tell
_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def is_long(path: Path) -> bool:
    """Return whether *path* occupies more than `OCCUPIED_BYTES_MAX`. Takes microseconds."""
    try:
        return path.stat().st_blocks * 512 > OCCUPIED_BYTES_MAX
    except OSError:
        return False


def shorten(path: Path) -> bool:
    """If *path* occupies more than `OCCUPIED_BYTES_MAX`, free all but its beginning and its end. Blocks.

    Returns:
        Whether it did.

    Raises:
        BackendError: the filesystem cannot.
    """
    with os_errors("shortening a console log"):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        try:
            facts = os.fstat(fd)
            if facts.st_blocks * 512 <= OCCUPIED_BYTES_MAX:
                return False
            end = (facts.st_size - END_BYTES) // _ALIGNMENT_BYTES * _ALIGNMENT_BYTES
            if end <= BEGINNING_BYTES:  # it occupies more than it holds: nothing to gain
                return False
            if _libc.fallocate(fd, _PUNCH_HOLE_KEEP_SIZE, BEGINNING_BYTES, end - BEGINNING_BYTES) != 0:
                number = ctypes.get_errno()
                raise BackendError(f"the console log {path} cannot be shortened: {os.strerror(number)}.")
            return True
        finally:
            os.close(fd)
