"""Reads a log of a VM over a WebSocket, to its end or as it grows."""

from __future__ import annotations

import json
from collections.abc import Callable
from urllib.parse import quote

from noid.client.calls.call import with_query
from noid.client.channels import Closed, Message
from noid.client.errors import ServerError
from noid.client.link import Link
from noid.client.settings import Endpoint
from noid.client.waiting import Blocking, Turns, finished
from noid.client.websocket import WebSocket
from noid.core import wire


class LogProtocol:
    """What is said of one log. *start* and *end* are the offsets of its first byte and behind the last one.

    *on_output* gets channel (1 stdout, 2 stderr) and bytes, *on_gap* the offsets between which nothing is kept.
    """

    def __init__(self, on_output: Callable[[int, bytes], None], on_gap: Callable[[int, int], None]) -> None:
        self.start = 0
        self.end: int | None = None
        self._on_output, self._on_gap = on_output, on_gap

    def handle(self, message: Message) -> None:
        """Take what has come.

        Raises:
            ServerError: the agent refuses to go on.
            EOFError: it has ended in the middle.
        """
        match message:
            case Closed():
                raise EOFError("it ended the log in the middle")
            case (wire.STDOUT | wire.STDERR as channel, data):
                self._on_output(channel, data)
            case str():
                match json.loads(message):
                    case {"log": {"offset": int(start)}}:
                        self.start = start
                    case {"gap": {"start": int(gap_start), "end": int(gap_end)}}:
                        self._on_gap(gap_start, gap_end)
                    case {"end": {"offset": int(end)}}:
                        self.end = end
                    case {"error": str(error), **rest}:
                        raise ServerError(error, status=0, code=str(rest.get("code", "internal")))


async def opened(
    link: Link, name: str, log: str, *, offset: int, follow: bool, turns: Turns | None = None
) -> WebSocket:
    """Return a WebSocket to *log* of the VM *name* from *offset* on, whose messages `LogProtocol` understands."""
    path = f"/v1/vms/{name}/logs/{quote(log, safe='')}"
    return await WebSocket.open(link, with_query(path, offset=offset, follow=1 if follow else None), turns=turns)


def read(
    endpoint: Endpoint,
    name: str,
    log: str,
    *,
    offset: int,
    follow: bool,
    on_output: Callable[[int, bytes], None],
    on_gap: Callable[[int, int], None],
) -> tuple[int, int]:
    """Read *log* of the VM *name* from *offset* on, counted from its end if negative.

    *on_output* gets channel (1 stdout, 2 stderr) and bytes, *on_gap* the offsets between which nothing is kept.

    Returns:
        The offsets of the first byte and behind the last one.

    Raises:
        ConnectionFailed, ServerError: it cannot be read.
        ConnectionLost: the connection ended before the log did.
    """
    protocol = LogProtocol(on_output, on_gap)
    ws = finished(opened(Link(endpoint, Blocking()), name, log, offset=offset, follow=follow))
    try:
        while protocol.end is None:
            messages, _ = finished(ws.step())
            for message in messages:
                try:
                    protocol.handle(message)
                except EOFError as error:
                    raise ws.lost(str(error)) from error
                if protocol.end is not None:
                    break
    finally:
        ws.close()
    return protocol.start, protocol.end
