"""One agent, and how to wait for it: what every way of talking to it is made from.

A call that changes something is sent with a key of its own. When the connection is lost before the answer came, nobody
knows whether it was carried out; then it is sent again, once, with the same key, to an agent that does nothing twice
for one key (noid-server since 0.3.0).
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar

from noid.client import http
from noid.client.calls.call import PAGES_MAX, AnswerT, Call, NotNoid, Reply, next_page, refusal
from noid.client.errors import ConnectionFailed, ConnectionLost, ServerError, ServerTooOld
from noid.client.settings import Endpoint
from noid.client.waiting import Waiting

BACK_SECS = 10.0
"""How long an agent may be gone after it lost a connection: it is being started anew."""
RETRY_SECS = 0.2
KEY_HEADER = "Idempotency-Key"
FIRST_VERSION = (0, 3)
"""The first version of this noid-server; what is older is the predecessor's."""
VERSION_CHARACTERS_MAX = 40
CHANGES = ("POST", "PATCH", "DELETE")
T = TypeVar("T")
_WHICH: Call[Reply] = Call(method="GET", path="/version", understand=lambda reply: reply)


class Link:
    """Talks to the agent at *endpoint*, a connection for each call."""

    def __init__(self, endpoint: Endpoint, waiting: Waiting) -> None:
        self.endpoint = endpoint
        self.waiting = waiting
        self._version: str | None = None

    async def perform(self, call: Call[AnswerT]) -> AnswerT:
        """Make *call* and return its answer.

        Raises:
            ServerError: the agent refused or failed. `ServerTooOld`: it cannot do that.
            ConnectionFailed: there is no agent, or it went away; what was asked for may or may not have happened.
        """
        if call.unsafe_before is not None:
            await self.require(*call.unsafe_before)
        reply = await self.reply(call)
        if not 200 <= reply.status < 300:
            raise await self.refused(call.method, call.path, reply)
        try:
            answer = call.understand(reply)
            if call.add is not None:
                await self._read_on(call, reply, answer, call.add)
        except NotNoid as error:
            raise self.nonsense() from error
        return answer

    async def _read_on(
        self, call: Call[AnswerT], reply: Reply, answer: AnswerT, add: Callable[[AnswerT, AnswerT], object]
    ) -> None:
        """Put the pages behind *reply* into *answer*, `PAGES_MAX` at most."""
        for _ in range(PAGES_MAX):
            path = next_page(call.path, reply)
            if path is None:
                return
            reply = await self.reply(replace(call, path=path))
            if not 200 <= reply.status < 300:
                raise await self.refused(call.method, path, reply)
            add(answer, call.understand(reply))
        raise NotNoid

    async def reply(self, call: Call[Any]) -> Reply:
        """Make *call* and return what came, whatever its status.

        Raises:
            ConnectionFailed: as for `perform`.
        """
        if call.method not in CHANGES:
            return await self.ask(lambda: http.request(self.endpoint, self.waiting, call))
        call = keyed(call)
        try:
            return await http.request(self.endpoint, self.waiting, call)
        except ConnectionLost:
            if not await self._keeps_keys():
                raise
            return await http.request(self.endpoint, self.waiting, call)

    async def ask(self, question: Callable[[], Awaitable[T]]) -> T:
        """Return the answer to *question*, which changes nothing.

        It is asked once more where this user's own agent was ending when it came: the next one is started by asking.

        Raises:
            ConnectionFailed: as for `perform`.
        """
        try:
            return await question()
        except ConnectionLost:
            if self.endpoint.data_dir is None:
                raise
            return await question()

    async def refused(self, method: str, path: str, reply: Reply) -> ServerError:
        """Return the error that *reply*, whose status is none of success, stands for.

        Whoever asks an old server for something new is not told that there is no such thing.
        """
        from noid.client import predecessor

        deed = predecessor.cannot(method, path)
        if deed is not None and predecessor.is_unknown_route(reply) and (version := await self.version()):
            return ServerTooOld(self.endpoint.address, version, deed)
        return refusal(self.endpoint.address, reply)

    async def require(self, deed: str, instead: str = "") -> None:
        """Make sure that this is no server before 0.3.0, which cannot *deed*; *instead* is what to do there.

        Raises:
            ServerTooOld: it is.
        """
        if (version := await self.old_version()) is not None:
            raise ServerTooOld(self.endpoint.address, version, deed, instead)

    async def old_version(self) -> str | None:
        """Return the version of a server before 0.3.0; None for newer ones, and where nobody says."""
        if self.endpoint.url is None:
            return None  # those did not listen on unix sockets
        version = await self.version()
        return version if version is not None and _numbers(version) < FIRST_VERSION else None

    async def version(self) -> str | None:
        """Return which version the agent says it is, None if it does not say."""
        if self._version is None:
            try:
                reply = await http.request(self.endpoint, self.waiting, _WHICH)
            except ConnectionFailed:
                return None
            self._version = _version(reply)
        return self._version

    def nonsense(self) -> ConnectionFailed:
        """Return the error that an answer stands for which no noid-server gives."""
        return ConnectionFailed(
            f"{self.endpoint.address} answered something noid-server would not. Is the URL right, or a login page in "
            "between?"
        )

    async def _keeps_keys(self) -> bool:
        """Return whether an agent is there, again or still, that does nothing twice for one key."""
        until = time.monotonic() + BACK_SECS
        while True:
            try:
                version = _version(await http.request(self.endpoint, self.waiting, _WHICH))
                return version is not None and _numbers(version) >= FIRST_VERSION
            except ConnectionLost:
                return False
            except ConnectionFailed:
                if time.monotonic() >= until:
                    return False
            await self.waiting.sleep(RETRY_SECS)


def keyed(call: Call[AnswerT]) -> Call[AnswerT]:
    """Return *call* with a key, by which a server knows it when it is repeated."""
    return replace(call, headers={KEY_HEADER: os.urandom(16).hex(), **call.headers})


def _version(reply: Reply) -> str | None:
    """Return the version an agent says it has, if it is one."""
    try:
        version = str(reply.json()["version"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return version if reply.status == 200 and _numbers(version) else None


def _numbers(version: str) -> tuple[int, ...]:
    """Return the first two numbers of *version*, or nothing if it is none."""
    numbers = version.split(".")[:2]
    is_one = len(version) <= VERSION_CHARACTERS_MAX and version.isascii() and version.isprintable()
    return tuple(map(int, numbers)) if is_one and len(numbers) == 2 and all(map(str.isdigit, numbers)) else ()
