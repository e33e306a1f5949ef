"""The WebSocket protocol as noid's streams use it, without a socket: bytes in, channels and texts out, and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from noid.client import frames
from noid.client.frames import Malformed
from noid.core import wire

UNSENT_BYTES_MAX = 4 * wire.CHUNK_BYTES
TEXT_BYTES_MAX = 1 << 20
NORMAL = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """The agent said goodbye."""

    code: int
    reason: str


PLAIN = 0
"""The channel of what has none, where messages are bytes and nothing before them: see `Channels`."""

Message = tuple[int, bytes] | str | Closed
"""What comes: a channel and data, a text, or the end."""


class Channels:
    """One connection's state. *unsent* is what the socket is to be given; who gives it takes it away.

    *plain*: messages have no channel, and an empty one means something; its data is nothing.
    """

    def __init__(self, leftover: bytes = b"", *, plain: bool = False) -> None:
        self.unsent = bytearray()
        self.has_early = bool(leftover)
        """Whether `receive` has something to say before anything more has come."""
        self._plain = plain
        self._incoming = frames.Incoming(leftover)
        self._said_goodbye = False
        self._channel = 0  # of the binary message that is being received
        self._inside_message = False
        self._text = bytearray()

    @property
    def has_room(self) -> bool:
        """Whether more should be sent now."""
        return len(self.unsent) < UNSENT_BYTES_MAX

    def send(self, channel: int, data: bytes) -> None:
        """Send *data* on *channel*."""
        self.unsent += frames.frame(frames.BINARY, data if self._plain else wire.frame(channel, data))

    def send_size(self, columns: int, rows: int) -> None:
        """Send how large the terminal is."""
        self.unsent += frames.frame(frames.BINARY, wire.resize_frame(columns, rows))

    def send_text(self, text: str) -> None:
        """Send a text message."""
        self.unsent += frames.frame(frames.TEXT, text.encode())

    def goodbye(self) -> bytes:
        """Return what ends the connection politely, if anything does now."""
        if self.unsent or self._said_goodbye:
            return b""  # the middle of a frame is no place to say anything
        self._said_goodbye = True
        return frames.close_frame(NORMAL)

    def receive(self, data: bytes = b"") -> Iterator[Message]:
        """Yield what *data* completes, and what came with the handshake. A large message comes in pieces.

        Raises:
            Malformed: it is no WebSocket.
        """
        for opcode, received, finished in self._incoming.feed(data):
            match opcode:
                case frames.BINARY:
                    yield from self._binary(received, finished)
                case frames.TEXT:
                    self._text += received
                    if len(self._text) > TEXT_BYTES_MAX:
                        raise Malformed("it sent an endless message")
                    if finished:
                        yield frames.text(bytes(self._text))
                        self._text.clear()
                case frames.PING if self.has_room:  # of many at once, not all want an answer
                    self.unsent += frames.frame(frames.PONG, received)
                case frames.CLOSE:
                    code, reason = frames.closing(received)
                    yield Closed(code=code, reason=reason)

    def _binary(self, chunk: bytes, finished: bool) -> Iterator[Message]:
        if self._plain:
            if chunk or (finished and not self._inside_message):
                yield PLAIN, chunk
            self._inside_message = not finished
            return
        if chunk and not self._inside_message:  # one channel byte comes before all pieces
            self._channel, chunk = wire.split_frame(chunk)
            self._inside_message = True
        if chunk:
            yield self._channel, chunk
        if finished:
            self._inside_message = False
