"""Where a guest's output goes: our own stdout and stderr, unbuffered, so that what has come is seen."""

from __future__ import annotations

import os
import select

from noid.core import wire

STDOUT_FD, STDERR_FD = 1, 2


def write(channel: int, data: bytes) -> None:
    """Write *data* at once and completely. Waiting for a slow reader is what slows the guest's process down, too."""
    descriptor = STDOUT_FD if channel == wire.STDOUT else STDERR_FD
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:  # somebody who shares this terminal or pipe has made it non-blocking
            select.select([], [descriptor], [])
