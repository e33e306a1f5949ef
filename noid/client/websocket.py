"""A WebSocket to the agent: one step after the other, of which each waits for whatever can be done next."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from noid.client import http
from noid.client.calls.call import Reply
from noid.client.channels import Channels, Malformed, Message
from noid.client.connecting import RECEIVE_BYTES, Connection
from noid.client.errors import ConnectionFailed, ConnectionLost, ServerTooOld
from noid.client.link import Link
from noid.client.waiting import Source, Turns

_UPGRADE_REQUIRED = 426
_NOT_AS_A_WEBSOCKET = frozenset({400, _UPGRADE_REQUIRED, 500, 501, 502, 503})


class NoWebSocket(ConnectionFailed):
    """Something in between, or a server that has no session left, allows none. Plain requests may get through."""


class WebSocket:
    """An open one. Messages are sent with `channels` and `flush`; close it, whatever happens.

    Attributes:
        is_deaf: Whether sending failed. What the agent said last is still to be read, and reading finds its end.
        old_version: That of a server before 0.3.0, see `noid.client.predecessor`; None for others.
    """

    def __init__(self, address: str, connection: Connection, channels: Channels, fate: str, turns: Turns) -> None:
        self.channels = channels
        self.is_deaf = False
        self.old_version: str | None = None
        self._address = address
        self._connection = connection
        self._turns = turns
        self._has_early = channels.has_early
        self._fate = fate

    @classmethod
    async def open(
        cls,
        link: Link,
        path: str,
        *,
        fate: str = "The VM is not affected.",
        turns: Turns | None = None,
        plain: bool = False,
    ) -> WebSocket:
        """Open one to *path*. *fate* is what a loss of it means, for the error.

        Where several tasks share it, each takes one of *turns* for a `step`. *plain* is that of `Channels`.

        Raises:
            ConnectionFailed: there is no agent.
            ServerError: it refused. `ServerTooOld`: it cannot do that.
            NoWebSocket: there is none to be had, though what is asked for may be.
        """
        upgraded = await link.ask(lambda: http.upgrade(link.endpoint, link.waiting, path))
        if isinstance(upgraded, Reply):
            if 200 <= upgraded.status < 300:
                raise NoWebSocket(
                    f"{link.endpoint.address} ignored the wish for a WebSocket. Is there a proxy in between?"
                )
            error = await link.refused("GET", path, upgraded)
            if upgraded.status in _NOT_AS_A_WEBSOCKET and not _is_coded(upgraded):
                raise NoWebSocket(f"{link.endpoint.address} allows no WebSocket now: {error}") from error
            raise error
        connection, leftover, told_its_version = upgraded
        channels = Channels(leftover, plain=plain)
        ws = cls(link.endpoint.address, connection, channels, fate, turns or link.waiting.turns())
        if not told_its_version:
            try:
                await ws._know_predecessor(link, path)
            except BaseException:
                ws.close()
                raise
        return ws

    async def _know_predecessor(self, link: Link, path: str) -> None:
        """Find out whether it is one, and whether there is anything behind *path* there: it upgrades in any case."""
        from noid.client import predecessor

        self.old_version = await link.old_version()
        if self.old_version is None:
            return
        if (deed := predecessor.cannot("GET", path)) is not None:
            raise ServerTooOld(self._address, self.old_version, deed)
        await predecessor.check_vm(link, predecessor.vm_of(path))

    def flush(self) -> None:
        """Send what is unsent, as far as the socket takes it."""
        unsent = self.channels.unsent
        try:
            while unsent:
                with memoryview(unsent) as whole, whole[:RECEIVE_BYTES] as beginning:  # a view left over forbids `del`
                    sent = self._connection.send_now(beginning)
                if not sent:
                    return
                del unsent[:sent]
        except OSError:
            unsent.clear()
            self.is_deaf = True

    async def step(
        self,
        readers: Sequence[Source] = (),
        *,
        writers: Sequence[Source] = (),
        secs: float | None = None,
        listening: bool = True,
    ) -> tuple[list[Message], Sequence[Source]]:
        """Send and receive what can be, once something can, or *secs* are over.

        It also ends when one of *readers* can be read, or one of *writers* takes something.

        Returns:
            What has come, and which of *readers* have something.

        Raises:
            ConnectionLost: the connection ended without a goodbye.
        """
        if self._has_early:  # of which no waiting would tell
            self._has_early = False
            return self._understood(b""), ()
        self.flush()
        sock = self._connection.socket
        reading = [sock, *readers] if listening else readers
        writing = [sock, *writers] if self.channels.unsent else writers
        readable, writable = await self._turns.until_ready(reading, writing, secs)
        if sock in writable:
            self.flush()
        messages: list[Message] = []
        if sock in readable:
            try:
                data = self._connection.receive_now()
            except OSError as error:
                raise self.lost(error.strerror or str(error)) from error
            if data is not None:
                if not data:
                    raise self.lost("it closed the connection")
                messages = self._understood(data)
        return messages, [source for source in readable if source is not sock]

    def close(self) -> None:
        """Say goodbye if that costs nothing, and hang up."""
        if goodbye := self.channels.goodbye():
            with contextlib.suppress(OSError):  # it is gone already, which was the aim
                self._connection.send_now(goodbye)
        self._connection.close()

    def lost(self, detail: str) -> ConnectionLost:
        """Return the error that *detail* is for whoever reads this."""
        return ConnectionLost(f"{self._address}: {detail}. {self._fate}")

    def _understood(self, data: bytes) -> list[Message]:
        try:
            return list(self.channels.receive(data))
        except Malformed as error:
            raise self.lost(str(error)) from error


def _is_coded(reply: Reply) -> bool:
    """Return whether *reply* is a refusal of this noid-server, which means it."""
    try:
        fields = reply.json()
    except (ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and "code" in fields and reply.status != _UPGRADE_REQUIRED
