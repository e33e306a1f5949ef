"""The floors of ``noid bench server``, each a program of its own: servers that only answer, always the same.

Usage: ``python -m noid_bench.bare_servers trio|hypercorn HOST:PORT READY_FD``, with the answers on stdin as a JSON
object: what is asked (``GET /healthz``) to ``{"status", "headers", "body"}``. Serves until SIGTERM.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import h11
import trio
from hypercorn.config import Config
from hypercorn.trio import serve


def main() -> None:
    """Serve."""
    kind, listen, ready_fd = sys.argv[1], sys.argv[2], int(sys.argv[3])
    answers = {
        asked: (answer["status"], [(k.encode(), v.encode()) for k, v in answer["headers"]], answer["body"].encode())
        for asked, answer in json.load(sys.stdin).items()
    }

    def ready() -> None:
        with os.fdopen(ready_fd, "w") as pipe:
            pipe.write("ready")

    trio.run({"trio": _serve_by_h11, "hypercorn": _serve_by_hypercorn}[kind], answers, listen, ready)


Answers = dict[str, tuple[int, list[tuple[bytes, bytes]], bytes]]


async def _serve_by_h11(answers: Answers, listen: str, ready: Callable[[], None]) -> None:
    """Trio's sockets and h11, and nothing between them and the answer."""
    host, _, port = listen.rpartition(":")

    async def converse(stream: trio.SocketStream) -> None:
        connection = h11.Connection(h11.SERVER)
        asked = ""
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(bytes(await stream.receive_some(65536)))
            elif isinstance(event, h11.Request):
                asked = f"{event.method.decode()} {event.target.decode()}"
            elif isinstance(event, h11.EndOfMessage):
                status, headers, body = answers[asked]
                sent = connection.send(h11.Response(status_code=status, headers=headers)) or b""
                sent += connection.send(h11.Data(data=body)) or b""
                sent += connection.send(h11.EndOfMessage()) or b""
                await stream.send_all(sent)
                connection.start_next_cycle()
            elif isinstance(event, h11.ConnectionClosed):
                return

    async with trio.open_nursery() as nursery:
        await nursery.start(partial(trio.serve_tcp, converse, int(port), host=host))
        ready()


async def _serve_by_hypercorn(answers: Answers, listen: str, ready: Callable[[], None]) -> None:
    """Hypercorn as it comes, with an application that is nothing but two messages."""
    by_route = {}
    for asked, (status, headers, body) in answers.items():
        method, _, target = asked.partition(" ")
        own = [(name, value) for name, value in headers if name != b"date"]  # hypercorn's own
        by_route[method, target] = (
            {"type": "http.response.start", "status": status, "headers": own},
            {"type": "http.response.body", "body": body, "more_body": False},
        )

    async def app(scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
        if scope["type"] == "lifespan":
            while True:
                kind = (await receive())["type"]
                await send({"type": f"{kind}.complete"})
                if kind == "lifespan.shutdown":
                    return
        if scope["method"] == "POST":
            while (await receive()).get("more_body"):
                pass
        for message in by_route[scope["method"], scope["path"]]:
            await send(message)

    config = Config()
    config.bind = [listen]
    config.include_server_header = False
    config.keep_alive_max_requests = 1_000_000
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve, app, config))
        ready()


if __name__ == "__main__":
    main()
