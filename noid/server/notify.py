"""Telling systemd how the service is (sd_notify): a datagram to the socket it names; nothing where there is none."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, MutableMapping

import trio

logger = logging.getLogger(__name__)


class Notifier:
    """The socket and the watchdog of `sd_notify(3)`. Taken from *environment*, so that no child finds them."""

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        path = environment.pop("NOTIFY_SOCKET", "")
        usec, pid = environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", "")
        self._address = f"\0{path[1:]}" if path.startswith("@") else path
        mine = pid in ("", str(os.getpid()))
        self._watchdog_secs = int(usec) / 1e6 if path and mine and usec.isascii() and usec.isdigit() else 0.0

    def ready(self, status: str) -> None:
        """Say that requests are answered, or are again."""
        self._send("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """Say that the configuration is being read anew; `ready` follows."""
        usec = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={usec}", "STATUS=Reading the configuration anew")

    def stopping(self) -> None:
        """Say that the end has begun."""
        self._send("STOPPING=1", "STATUS=Ending; VMs keep running")

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Say twice in each of the watchdog's intervals that the event loop turns, for as long as the body takes."""
        async with trio.open_nursery() as nursery:
            if self._watchdog_secs:
                nursery.start_soon(self._say_alive)
            yield
            nursery.cancel_scope.cancel()

    async def _say_alive(self) -> None:
        while True:
            self._send("WATCHDOG=1")
            await trio.sleep(self._watchdog_secs / 2)

    def _send(self, *lines: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)
                sock.sendto("\n".join(lines).encode(), self._address)
        except OSError as error:  # the service goes on without
            logger.warning("cannot notify the service manager of %s: %s", lines[0], error)
