"""WebSocket frames as a client without extensions sends and receives them (RFC 6455, section 5): bytes in, bytes out.

By hand, as the HTTP of `noid.client.http`: no library lets one import its codec alone. wsproto, which the server speaks
through, brings h11 and OpenSSL along, a quarter of all that ``noid exec`` takes beyond the server; websockets brings
logging and http, and takes longer still.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

TEXT = 0x1
BINARY = 0x2
CLOSE = 0x8
PING = 0x9
PONG = 0xA

_CONTINUATION = 0x0
_DATA = (TEXT, BINARY, _CONTINUATION)
_CONTROL = (CLOSE, PING, PONG)
_LAST = 0x80
_RESERVED = 0x70
_MASKED = 0x80
_TWO_BYTES, _EIGHT_BYTES = 126, 127
_CONTROL_BYTES_MAX = 125
_SIZE_MAX = 1 << 63

Piece = tuple[int, bytes, bool]
"""A part of a message: its opcode, data, and whether the message ends with it."""


class Malformed(ValueError):
    """What came is no WebSocket, or no reasonable one."""


def frame(opcode: int, data: bytes) -> bytes:
    """Return *data* as one frame that is a message of its own."""
    size = len(data)
    if size < _TWO_BYTES:
        length = bytes((_MASKED | size,))
    elif size < 1 << 16:
        length = bytes((_MASKED | _TWO_BYTES,)) + size.to_bytes(2, "big")
    else:
        length = bytes((_MASKED | _EIGHT_BYTES,)) + size.to_bytes(8, "big")
    key = os.urandom(4)
    repeated = (key * (size // 4 + 1))[:size]
    masked = int.from_bytes(data, sys.byteorder) ^ int.from_bytes(repeated, sys.byteorder)
    return b"".join((bytes((_LAST | opcode,)), length, key, masked.to_bytes(size, sys.byteorder)))


def close_frame(code: int) -> bytes:
    """Return what says goodbye."""
    return frame(CLOSE, code.to_bytes(2, "big"))


def closing(data: bytes) -> tuple[int, str]:
    """Return code and reason of a goodbye; 1005 is RFC 6455's code for none.

    Raises:
        Malformed: it is neither.
    """
    if not data:
        return 1005, ""
    if len(data) == 1:
        raise Malformed("it said goodbye with half a code")
    return int.from_bytes(data[:2], "big"), text(data[2:])


def text(data: bytes) -> str:
    """Return *data* of a message that is text.

    Raises:
        Malformed: it is none.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Malformed("it sent text that is not UTF-8") from error


class Incoming:
    """What comes from a server. Data is passed on as it arrives, however long its frame or message will be."""

    def __init__(self, received: bytes = b"") -> None:
        self._buffer = bytearray(received)
        self._message: int | None = None  # the opcode of the message that is being received
        self._left: int | None = None  # of the data frame that is being received
        self._is_last = False  # of its message
        self._ended = False

    def feed(self, data: bytes) -> Iterator[Piece]:
        """Yield what *data* brings. What follows a goodbye is not looked at.

        Raises:
            Malformed: it is no WebSocket.
        """
        buffer = self._buffer
        buffer += data
        while not self._ended:
            if self._left is None:
                head = self._head()
                if head is None:
                    return
                opcode, is_last, size, start = head
                if opcode in _CONTROL:
                    if len(buffer) < start + size:
                        return
                    control = bytes(buffer[start : start + size])
                    del buffer[: start + size]
                    self._ended = opcode == CLOSE
                    yield opcode, control, True
                    continue
                del buffer[:start]
                self._begin(opcode, is_last, size)
            yield from self._data()
            if self._left is not None:
                return

    def _head(self) -> tuple[int, bool, int, int] | None:
        """Return opcode, whether the message ends with it, size and where its data begins, of the frame that begins."""
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        first, second = buffer[:2]
        opcode, is_last, size, start = first & 0x0F, bool(first & _LAST), second & ~_MASKED, 2
        if first & _RESERVED or opcode not in _DATA + _CONTROL:
            raise Malformed("it sent a frame of a kind that was not agreed on")
        if second & _MASKED:
            raise Malformed("it sent a masked frame, which only clients do")
        if opcode in _CONTROL and (not is_last or size > _CONTROL_BYTES_MAX):
            raise Malformed("it sent a control frame in pieces")
        if size >= _TWO_BYTES:
            start += 2 if size == _TWO_BYTES else 8
            if len(buffer) < start:
                return None
            size = int.from_bytes(buffer[2:start], "big")
            if size >= _SIZE_MAX:
                raise Malformed("it sent a frame of unreasonable length")
        return opcode, is_last, size, start

    def _begin(self, opcode: int, is_last: bool, size: int) -> None:
        if (opcode == _CONTINUATION) == (self._message is None):
            raise Malformed("it sent a message that begins in the middle, or in that of another")
        if opcode != _CONTINUATION:
            self._message = opcode
        self._left, self._is_last = size, is_last

    def _data(self) -> Iterator[Piece]:
        """Yield what there is of the data frame that is being received."""
        message, left = self._message, self._left
        assert message is not None  # noqa: S101  # `_begin` was there before
        assert left is not None  # noqa: S101  # the same
        data = bytes(self._buffer[:left])
        del self._buffer[: len(data)]
        left -= len(data)
        self._left = left or None
        ends = self._is_last and not left
        if ends:
            self._message = None
        if data or not left:
            yield message, data, ends
