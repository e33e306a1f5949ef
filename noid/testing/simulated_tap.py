"""Takes hold of TAP devices as a VMM does, for simulated ones. Standard library only."""

from __future__ import annotations

import fcntl
import os
import struct

_TUNSETIFF = 0x400454CA  # _IOW('T', 202, int), linux/if_tun.h
_TAP_NO_PI_VNET_HDR = 0x0002 | 0x1000 | 0x4000


def attached(name: str) -> int:
    """Return a descriptor that is connected to the TAP device *name*, which is made if there is none and one may.

    Raises:
        OSError: EBUSY where somebody else is connected to it.
    """
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP_NO_PI_VNET_HDR))
    except OSError:
        os.close(fd)
        raise
    return fd
