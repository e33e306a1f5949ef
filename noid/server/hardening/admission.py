"""How many connections there may be, in all and from one address, and what one too many hears."""

from __future__ import annotations

import contextlib
import json
import logging
from collections import Counter
from collections.abc import Callable

import trio

from noid.core.people.networks import place
from noid.core.wire import API_VERSION, API_VERSION_HEADER
from noid.errors import DependencyDown

logger = logging.getLogger(__name__)

TELL_EVERY_SECS = 10.0
WAITING_FOR_THEIR_END_MAX = 64

_BODY = json.dumps(
    {
        "error": "too many connections, in all or from your address. Close some, or try again later.",
        "code": DependencyDown.code,
    },
    separators=(",", ":"),
).encode()
REFUSAL = (
    b"HTTP/1.1 503 \r\ncontent-type: application/json\r\nconnection: close\r\nretry-after: 1\r\n"
    + f"{API_VERSION_HEADER.lower()}: {API_VERSION}\r\ncontent-length: {len(_BODY)}\r\n\r\n".encode()
    + _BODY
)


def _nobody(_address: str) -> bool:
    return False


class Connections:
    """Counts TCP connections. Those on the unix socket are not: whoever looks after a server can always come in.

    Attributes:
        most: How many there may be.
        most_per_address: How many there may be from one place, which is an IPv4 address or an IPv6 /64.
        is_proxy: Tells the addresses behind which there are many clients: for them only `most` holds.
    """

    def __init__(self) -> None:
        self.most = 4096
        self.most_per_address = 1024
        self.is_proxy: Callable[[str], bool] = _nobody
        self.open = 0
        self.refused = 0
        self._from: Counter[str] = Counter()
        self._ending = 0
        self._untold = 0
        self._told_at: float | None = None

    def take(self, address: str) -> bool:
        """Count a connection from *address*, and return True; or return False if it is one too many."""
        where = place(address)
        if self.open >= self.most or (self._from[where] >= self.most_per_address and not self.is_proxy(address)):
            if not self._from[where]:
                del self._from[where]
            self._note_refusal(address)
            return False
        self.open += 1
        self._from[where] += 1
        return True

    def give_back(self, address: str) -> None:
        """Say that a connection that was counted has ended."""
        where = place(address)
        self.open -= 1
        self._from[where] -= 1
        if not self._from[where]:
            del self._from[where]

    async def refuse(self, stream: trio.SocketStream, wait_secs: float) -> None:
        """Say 503 on *stream* and close it. Bounded, and cheap: nothing of the request is looked at.

        A few are given up to *wait_secs* to read that; a connection closed with unread input would lose the answer.
        """
        with contextlib.suppress(trio.BrokenResourceError), trio.move_on_after(wait_secs):  # it may be gone already
            await stream.send_all(REFUSAL)
            if self._ending < WAITING_FOR_THEIR_END_MAX:
                self._ending += 1
                try:
                    await stream.send_eof()
                    while await stream.receive_some(65536):
                        pass
                finally:
                    self._ending -= 1

    def _note_refusal(self, address: str) -> None:
        self.refused += 1
        self._untold += 1
        now = trio.current_time()
        if self._told_at is None or now - self._told_at >= TELL_EVERY_SECS:
            logger.warning(
                "refused %d connections, the last from %s: %d are open, at most %d may be, %d from one address",
                self._untold, address, self.open, self.most, self.most_per_address,
            )  # fmt: skip
            self._untold, self._told_at = 0, now
