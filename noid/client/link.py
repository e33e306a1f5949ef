"""One agent, and how to wait for it: what every way of talking to it is made from.

A call that changes something is sent with a key of its own. When the connection is lost before the answer came, nobody
knows whether it was carried out; then it is sent again, once, with the same key, to an agent that does nothing twice
for one key (noid-server since 0.3.0).
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

from noid.client import http
from noid.client.calls.call import AnswerT, Call, NotNoid, Reply, refusal
from noid.client.errors import ConnectionFailed, ConnectionLost
from noid.client.settings import Endpoint
from noid.client.waiting import Waiting

BACK_SECS = 10.0
"""How long an agent may be gone after it lost a connection: it is being started anew."""
RETRY_SECS = 0.2
KEY_HEADER = "Idempotency-Key"
KEYS_SINCE = (0, 3)
CHANGES = ("POST", "PATCH", "DELETE")


class Link:
    """Talks to the agent at *endpoint*, a connection for each call."""

    def __init__(self, endpoint: Endpoint, waiting: Waiting) -> None:
        self.endpoint = endpoint
        self.waiting = waiting

    async def perform(self, call: Call[AnswerT]) -> AnswerT:
        """Make *call* and return its answer.

        Raises:
            ServerError: the agent refused or failed.
            ConnectionFailed: there is no agent, or it went away; what was asked for may or may not have happened.
        """
        reply = await self.reply(call)
        if not 200 <= reply.status < 300:
            raise refusal(self.endpoint.address, reply)
        try:
            return call.understand(reply)
        except NotNoid as error:
            raise self.nonsense() from error

    async def reply(self, call: Call[Any]) -> Reply:
        """Make *call* and return what came, whatever its status.

        Raises:
            ConnectionFailed: as for `perform`.
        """
        if call.method not in CHANGES:
            return await http.request(self.endpoint, self.waiting, call)
        call = keyed(call)
        try:
            return await http.request(self.endpoint, self.waiting, call)
        except ConnectionLost:
            if not await self._keeps_keys():
                raise
            return await http.request(self.endpoint, self.waiting, call)

    def nonsense(self) -> ConnectionFailed:
        """Return the error that an answer stands for which no noid-server gives."""
        return ConnectionFailed(
            f"{self.endpoint.address} answered something noid-server would not. Is the URL right, or a login page in "
            "between?"
        )

    async def _keeps_keys(self) -> bool:
        """Return whether an agent is there, again or still, that does nothing twice for one key."""
        until = time.monotonic() + BACK_SECS
        question: Call[Reply] = Call(method="GET", path="/version", understand=lambda reply: reply)
        while True:
            try:
                reply = await http.request(self.endpoint, self.waiting, question)
                return reply.status == 200 and _version(reply) >= KEYS_SINCE
            except ConnectionLost:
                return False
            except ConnectionFailed:
                if time.monotonic() >= until:
                    return False
            await self.waiting.sleep(RETRY_SECS)


def keyed(call: Call[AnswerT]) -> Call[AnswerT]:
    """Return *call* with a key, by which a server knows it when it is repeated."""
    return replace(call, headers={KEY_HEADER: os.urandom(16).hex(), **call.headers})


def _version(reply: Reply) -> tuple[int, ...]:
    """Return the first two numbers of the version an agent says it has, or nothing."""
    try:
        words = str(reply.json()["version"]).split(".")
        return int(words[0]), int(words[1])
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return ()
