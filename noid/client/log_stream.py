"""Reads a log of a VM over a WebSocket, to its end or as it grows."""

from __future__ import annotations

import json
from collections.abc import Callable
from urllib.parse import quote

from noid.client.again import RETRY_SECS, Again
from noid.client.calls.call import with_query
from noid.client.channels import Closed, Message
from noid.client.errors import ConnectionFailed, ConnectionLost, ServerError
from noid.client.link import Link
from noid.client.settings import Endpoint
from noid.client.waiting import Blocking, Turns, finished
from noid.client.websocket import WebSocket
from noid.core import wire


class LogProtocol:
    """What is said of one log. *start* and *end* are the offsets of its first byte and behind the last one.

    *on_output* gets offset, channel (1 stdout, 2 stderr) and bytes, *on_gap* the offsets between which nothing is kept.
    """

    def __init__(self, on_output: Callable[[int, int, bytes], None], on_gap: Callable[[int, int], None]) -> None:
        self.start = 0
        self.end: int | None = None
        self.offset = 0
        """Of what comes next."""
        self.has_begun = False
        self.lineage: str | None = None
        """In which life of the VM; None where the agent does not tell, or has not yet."""
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
                self._on_output(self.offset, channel, data)
                self.offset += len(data)
            case str():
                match json.loads(message):
                    case {"log": {"offset": int(start), **rest}}:
                        if not self.has_begun:
                            self.start, self.has_begun = start, True
                        self.offset = start
                        lineage = rest.get("lineage")
                        self.lineage = lineage if isinstance(lineage, str) else None
                    case {"gap": {"start": int(gap_start), "end": int(gap_end)}}:
                        self.offset = gap_end
                        self._on_gap(gap_start, gap_end)
                    case {"end": {"offset": int(end)}}:
                        self.end = end
                    case {"error": str(error), **rest}:
                        raise ServerError(error, status=0, code=str(rest.get("code", "internal")))


async def opened(
    link: Link,
    name: str,
    log: str,
    *,
    offset: int,
    follow: bool,
    after: LogProtocol | None = None,
    turns: Turns | None = None,
) -> WebSocket:
    """Return a WebSocket to *log* of the VM *name* from *offset* on, whose messages `LogProtocol` understands.

    With *after*, from where that was.
    """
    path = f"/v1/vms/{name}/logs/{quote(log, safe='')}"
    lineage = None
    if after is not None and after.has_begun:
        offset, lineage = after.offset, after.lineage
    return await WebSocket.open(
        link,
        with_query(path, offset=offset, follow=1 if follow else None, resume=1 if follow else None, lineage=lineage),
        turns=turns,
    )


def read(
    endpoint: Endpoint,
    name: str,
    log: str,
    *,
    offset: int,
    follow: bool,
    on_output: Callable[[int, int, bytes], None],
    on_gap: Callable[[int, int], None],
    on_notice: Callable[[str], None] = lambda _: None,
) -> tuple[int, int]:
    """Read *log* of the VM *name* from *offset* on, counted from its end if negative.

    *on_output* gets offset, channel (1 stdout, 2 stderr) and bytes, *on_gap* the offsets between which nothing is kept.
    A log that one follows is gone on with where the connection is lost, which *on_notice* is told.

    Returns:
        The offsets of the first byte and behind the last one.

    Raises:
        ConnectionFailed, ServerError: it cannot be read.
        ConnectionLost: the connection ended before the log did, and was not made again, see `Again`.
    """
    link, protocol, again = Link(endpoint, Blocking()), LogProtocol(on_output, on_gap), Again()
    ws = finished(opened(link, name, log, offset=offset, follow=follow))
    try:
        while protocol.end is None:
            try:
                _hear(ws, protocol)
            except ConnectionLost as lost:
                if protocol.lineage is None:
                    raise
                if again.begins():
                    on_notice("the connection is lost; reading again")
                ws.close()
                ws = _reopened(link, name, log, protocol, again, lost)
                on_notice("reading again from where it was")
    finally:
        ws.close()
    return protocol.start, protocol.end


def _hear(ws: WebSocket, protocol: LogProtocol) -> None:
    messages, _ = finished(ws.step())
    for message in messages:
        try:
            protocol.handle(message)
        except EOFError as error:
            raise ws.lost(str(error)) from error
        if protocol.end is not None:
            break


def _reopened(link: Link, name: str, log: str, protocol: LogProtocol, again: Again, lost: ConnectionLost) -> WebSocket:
    while again.is_worth_it:
        finished(link.waiting.sleep(RETRY_SECS))
        try:
            ws = finished(opened(link, name, log, offset=0, follow=True, after=protocol))
        except ConnectionFailed:
            continue  # the agent is not up yet
        except ServerError as error:
            if error.status not in (503, 504):
                raise again.failed(lost, error) from error
        else:
            again.succeeded()
            return ws
    raise lost
