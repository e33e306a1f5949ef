"""The WebSocket protocol as noid's streams use it, without a socket: bytes in, channels and texts out, and back.

wsproto is all that is needed of WebSockets: importing trio-websocket with trio would take longer than most commands
run (110 ms, and this 17 ms).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, TextMessage
from wsproto.utilities import ProtocolError

from noid.core import wire

UNSENT_BYTES_MAX = 4 * wire.CHUNK_BYTES
TEXT_CHARACTERS_MAX = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """The agent said goodbye."""

    code: int
    reason: str


PLAIN = 0
"""The channel of what has none, where messages are bytes and nothing before them: see `Channels`."""

Message = tuple[int, bytes] | str | Closed
"""What comes: a channel and data, a text, or the end."""


class Malformed(ValueError):
    """What came is no WebSocket, or no reasonable one."""


class Channels:
    """One connection's state. *unsent* is what the socket is to be given; who gives it takes it away.

    *plain*: messages have no channel, and an empty one means something; its data is nothing.
    """

    def __init__(self, leftover: bytes = b"", *, plain: bool = False) -> None:
        self.unsent = bytearray()
        self.has_early = bool(leftover)
        """Whether `receive` has something to say before anything more has come."""
        self._plain = plain
        self._ws = Connection(ConnectionType.CLIENT, trailing_data=leftover)
        self._channel = 0  # of the binary message that is being received
        self._inside_message = False
        self._text: list[str] = []

    @property
    def has_room(self) -> bool:
        """Whether more should be sent now."""
        return len(self.unsent) < UNSENT_BYTES_MAX

    def send(self, channel: int, data: bytes) -> None:
        """Send *data* on *channel*."""
        self.unsent += self._ws.send(BytesMessage(data=data if self._plain else wire.frame(channel, data)))

    def send_size(self, columns: int, rows: int) -> None:
        """Send how large the terminal is."""
        self.unsent += self._ws.send(BytesMessage(data=wire.resize_frame(columns, rows)))

    def send_text(self, text: str) -> None:
        """Send a text message."""
        self.unsent += self._ws.send(TextMessage(data=text))

    def goodbye(self) -> bytes:
        """Return what ends the connection politely, if anything does now."""
        if self.unsent:
            return b""  # the middle of a frame is no place to say anything
        try:
            return self._ws.send(CloseConnection(code=1000))
        except ProtocolError:
            return b""  # it is closed already, which was the aim

    def receive(self, data: bytes = b"") -> Iterator[Message]:
        """Yield what *data* completes, and what came with the handshake. A large message comes in pieces.

        Raises:
            Malformed: it is no WebSocket.
        """
        try:
            if data:
                self._ws.receive_data(data)
            for event in self._ws.events():
                match event:
                    case BytesMessage(data=received, message_finished=finished):
                        chunk = bytes(received)
                        if self._plain:
                            if chunk or (finished and not self._inside_message):
                                yield PLAIN, chunk
                            self._inside_message = not finished
                            continue
                        if chunk and not self._inside_message:  # one channel byte comes before all pieces
                            self._channel, chunk = wire.split_frame(chunk)
                            self._inside_message = True
                        if chunk:
                            yield self._channel, chunk
                        if finished:
                            self._inside_message = False
                    case TextMessage(data=text, message_finished=finished):
                        self._text.append(text)
                        if sum(map(len, self._text)) > TEXT_CHARACTERS_MAX:
                            raise Malformed("it sent an endless message")
                        if finished:
                            yield "".join(self._text)
                            self._text.clear()
                    case Ping():
                        self.unsent += self._ws.send(event.response())
                    case CloseConnection(code=code, reason=reason):
                        yield Closed(code=code, reason=reason or "")
        except ProtocolError as error:
            raise Malformed(f"what it sent is no WebSocket: {error}") from error
