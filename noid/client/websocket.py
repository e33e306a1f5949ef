"""A WebSocket to the agent for one ``select`` loop: nothing here waits, and nothing is lost when a message is cut.

No event loop and no thread, for the reason `noid.client.exec_stream` gives.
"""

from __future__ import annotations

import contextlib

from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, TextMessage
from wsproto.utilities import ProtocolError

from noid.client import transport
from noid.client.calls.call import Reply, refusal
from noid.client.errors import ConnectionFailed, ConnectionLost
from noid.client.settings import Endpoint
from noid.core import wire

UNSENT_BYTES_MAX = 4 * wire.CHUNK_BYTES
TEXT_CHARACTERS_MAX = 1 << 20
_RECEIVE_BYTES = 2 * wire.CHUNK_BYTES  # more than a TLS record holds: nothing stays behind inside the TLS layer


class WebSocket:
    """Opened by making one, to *path* of *endpoint*.

    Raises:
        ConnectionFailed: there is no agent.
        ServerError: it refused.
    """

    def __init__(self, endpoint: Endpoint, path: str) -> None:
        upgraded = transport.upgrade(endpoint, path)
        if isinstance(upgraded, Reply):
            if 200 <= upgraded.status < 300:
                raise ConnectionFailed(
                    f"{endpoint.address} ignored the wish for a WebSocket. Is there a proxy in between?"
                )
            raise refusal(endpoint.address, upgraded)
        self.socket, leftover = upgraded
        self.socket.setblocking(False)
        self.is_closed = False
        """Whether the agent has said goodbye."""
        self._endpoint = endpoint
        self._ws = Connection(ConnectionType.CLIENT, trailing_data=leftover)
        self._unsent = bytearray()
        self._binary = bytearray()
        self._text: list[str] = []
        self._early = bool(leftover)

    @property
    def has_unsent(self) -> bool:
        """Whether `flush` has something to do once the socket is writable."""
        return bool(self._unsent)

    @property
    def has_room(self) -> bool:
        """Whether more may be given to `send`."""
        return len(self._unsent) < UNSENT_BYTES_MAX

    @property
    def has_early(self) -> bool:
        """Whether something came with the handshake, which no ``select`` tells of."""
        return self._early

    def send(self, message: bytes) -> None:
        """Send a binary message, as soon as the socket takes it."""
        self._unsent += self._ws.send(BytesMessage(data=message))
        self.flush()

    def flush(self) -> None:
        """Send what is unsent, as far as the socket takes it."""
        try:
            while self._unsent:
                del self._unsent[: self.socket.send(memoryview(self._unsent)[:_RECEIVE_BYTES])]
        except OSError as error:
            if not would_block(error):
                self._unsent.clear()  # it is gone; what it said last is still to be read, and reading finds its end

    def receive(self) -> list[bytes | str]:
        """Return the messages that have arrived whole. When the agent has closed, `is_closed` is set.

        Raises:
            ConnectionLost: the connection ended without a goodbye.
        """
        if not self._early:
            try:
                data = self.socket.recv(_RECEIVE_BYTES)
            except OSError as error:
                if would_block(error):
                    return []
                raise self._lost(error.strerror or str(error)) from error
            if not data:
                raise self._lost("it closed the connection")
            self._ws.receive_data(data)
        self._early = False
        return self._understood()

    def close(self) -> None:
        """Say goodbye if that costs nothing, and hang up."""
        if not self._unsent and not self.is_closed:
            with contextlib.suppress(OSError, ProtocolError):  # it is gone already, which was the aim
                self.socket.send(self._ws.send(CloseConnection(code=1000)))
        self.socket.close()

    def _understood(self) -> list[bytes | str]:
        messages: list[bytes | str] = []
        try:
            for event in self._ws.events():
                match event:
                    case BytesMessage(data=data, message_finished=finished):
                        self._binary += data
                        if finished:
                            messages.append(bytes(self._binary))
                            self._binary.clear()
                    case TextMessage(data=text, message_finished=finished):
                        self._text.append(text)
                        if finished:
                            messages.append("".join(self._text))
                            self._text.clear()
                    case Ping():
                        self._unsent += self._ws.send(event.response())
                    case CloseConnection():
                        self.is_closed = True
                if len(self._binary) > TEXT_CHARACTERS_MAX or sum(map(len, self._text)) > TEXT_CHARACTERS_MAX:
                    raise self._lost("it sent an endless message")
        except ProtocolError as error:
            raise self._lost(f"what it sent is no WebSocket: {error}") from error
        return messages

    def _lost(self, detail: str) -> ConnectionLost:
        return ConnectionLost(f"{self._endpoint.address}: {detail}. The VM is not affected.")


def would_block(error: OSError) -> bool:
    """Return whether *error* only says that there is nothing to do now."""
    if isinstance(error, (BlockingIOError, InterruptedError)):
        return True
    return type(error).__name__ in ("SSLWantReadError", "SSLWantWriteError")  # without importing ssl for plain sockets
