"""Reads a log of a VM over a WebSocket, to its end or as it grows."""

from __future__ import annotations

import json
import select
from collections.abc import Callable
from urllib.parse import quote

from noid.client.errors import ConnectionLost, ServerError
from noid.client.settings import Endpoint
from noid.client.websocket import WebSocket
from noid.core import wire


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
    query = f"?offset={offset}{'&follow=1' if follow else ''}"
    ws = WebSocket(endpoint, f"/v1/vms/{name}/logs/{quote(log, safe='')}{query}")
    start = 0
    try:
        while True:
            if not ws.has_early:
                select.select([ws.socket], [ws.socket] if ws.has_unsent else [], [])
            ws.flush()
            for message in ws.receive():
                if isinstance(message, bytes):
                    channel, data = wire.split_frame(message)
                    if channel in (wire.STDOUT, wire.STDERR):
                        on_output(channel, data)
                    continue
                match json.loads(message):
                    case {"log": {"offset": int(start)}}:
                        pass
                    case {"gap": {"start": int(gap_start), "end": int(gap_end)}}:
                        on_gap(gap_start, gap_end)
                    case {"end": {"offset": int(end)}}:
                        return start, end
                    case {"error": str(error), **rest}:
                        raise ServerError(error, status=0, code=str(rest.get("code", "internal")))
            if ws.is_closed:
                raise ConnectionLost(f"{endpoint.address}: it ended the log in the middle.")
    finally:
        ws.close()
