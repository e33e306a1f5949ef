"""Connecting to a unix socket in bounded time, without making it non-blocking."""

from __future__ import annotations

import socket
import struct

CONNECT_SECS = 5.0


def connect_unix(path: str) -> socket.socket:
    """Return a socket connected to *path*, waiting for a place in a full queue for at most `CONNECT_SECS`.

    Raises:
        OSError: as connect(2) says; EAGAIN when it took too long.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Not settimeout(): that makes the socket non-blocking, and then a full queue fails at once.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(CONNECT_SECS), 0))
        sock.connect(path)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, 0))
    except BaseException:
        sock.close()
        raise
    return sock
