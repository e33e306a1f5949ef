"""Keeping a socket from going silent while an operation runs, without pretending to know how it will end.

The predecessor's client gives up when a socket is silent for 30 s, and the first create of a shape takes longer than
that. Its status is not known before it has ended, so nothing of the answer can be sent early without lying. What can be
sent is ``100 Continue``: any number of those may precede the answer, and an HTTP/1.1 client must skip them. Behind a
proxy, which may not, the socket stays silent.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import trio
from quart import request

from noid.core.waiting import plain_nursery
from noid.server.hardening import Transport

STILL_WORKING_SECS = 10.0


@contextlib.asynccontextmanager
async def still_working() -> AsyncIterator[None]:
    """Send the current request's client a sign of life every `STILL_WORKING_SECS` while the body runs."""
    if any(header in request.headers for header in ("Via", "Forwarded", "X-Forwarded-For")):
        yield
        return
    transport = Transport.of(request.scope)

    async def say_so() -> None:
        while True:
            await trio.sleep(STILL_WORKING_SECS)
            await transport.say_still_working()

    async with plain_nursery() as nursery:
        nursery.start_soon(say_so)
        yield
        nursery.cancel_scope.cancel()
