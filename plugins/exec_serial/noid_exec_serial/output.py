"""Puts a command's output together from the pieces its encoders print, and notices every byte that is missing.

Each stream comes in numbered blocks of up to 6 KiB, a block in numbered pieces, and after them how many pieces,
characters and which sum there were: POSIX ``cksum``, MD5 where a root has no cksum, or none (``-``). A block whose
pieces are not all there, or whose sum differs, is lost as a whole and said to be.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import zlib
from dataclasses import dataclass

from noid_exec_serial.records import Record

_BLOCK_BYTES_MAX = 6144
_PIECES_MAX = 1024
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


@dataclass(frozen=True, slots=True)
class Output:
    """Bytes of a stream, in order, each exactly as the command wrote it."""

    stream: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Lost:
    """Bytes of a stream that arrived damaged beyond mending. *size* is exact, or where that was lost too, a bound."""

    stream: int
    size: int


class Assembler:
    """Takes the records ``d``, ``b`` and ``z`` of one stream. Holds one block.

    Attributes:
        complete: All the command wrote has been returned. What its children write later is not its output.
        ended: Nothing more can come.
    """

    def __init__(self, stream: int, encoding: str, end_mark: bytes) -> None:
        self.complete = self.ended = False
        self._end_mark = end_mark
        self._held = b""
        self._stream = stream
        self._encoding = encoding
        self._block = 0
        self._pieces: dict[int, str] = {}

    def take(self, record: Record) -> list[Output | Lost]:
        """Return what is known because of *record*."""
        if self.ended:
            return []
        number = int(record.fields[1])
        if number < self._block:  # said twice, or nonsense
            return []
        found: list[Output | Lost] = []
        if number > self._block:  # the end of the current block never came, nor anything of those between
            found.append(Lost(self._stream, (number - self._block) * _BLOCK_BYTES_MAX))
            self._block, self._pieces = number, {}
        if record.kind == "d":
            if len(self._pieces) < _PIECES_MAX:
                self._pieces.setdefault(int(record.fields[2]), record.fields[4])
        elif record.kind == "b":
            found += self._until_end_mark(self._completed(record))
            self._block, self._pieces = number + 1, {}
        else:
            if self._held:
                found.append(Output(self._stream, self._held))
            self.complete = self.ended = True
            self._held = b""
        return found

    def _until_end_mark(self, found: Output | Lost) -> list[Output | Lost]:
        """Cut the end mark off, which may come in two blocks."""
        if self.complete:
            return []
        held, self._held = self._held, b""
        if isinstance(found, Lost):
            return [Output(self._stream, held), found] if held else [found]
        data, mark, _ = (held + found.data).partition(self._end_mark)
        if mark:
            self.complete = True
        else:
            size = next((n for n in range(len(self._end_mark) - 1, 0, -1) if data.endswith(self._end_mark[:n])), 0)
            data, self._held = data[: len(data) - size], data[len(data) - size :]
        return [Output(self._stream, data)] if data else []

    def _completed(self, record: Record) -> Output | Lost:
        count, characters = int(record.fields[2]), int(record.fields[3])
        text = "".join(self._pieces.get(index, "") for index in range(min(count, _PIECES_MAX)))
        lost = Lost(self._stream, characters // 2 if self._encoding == "hex" else characters // 4 * 3)
        summed = record.fields[4] in ("-", _sum(text.encode("ascii"), record.fields[4]))
        if len(text) != characters or not summed:
            return lost
        try:
            data = bytes.fromhex(text) if self._encoding == "hex" else base64.b64decode(text, validate=True)
        except (ValueError, binascii.Error):
            return lost
        return Output(self._stream, data)


def _sum(data: bytes, like: str) -> str:
    """Return the sum of *data* of the kind *like* is. It guards against accidents, not against guests."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest() if len(like) == 32 else str(cksum(data))


def cksum(data: bytes) -> int:
    """Return the sum the POSIX utility ``cksum`` prints for *data*.

    It is the CRC of zlib with every byte's bits the other way round, begun at 0, with the length as its last bytes.
    """
    length = len(data)
    while length:
        data += bytes([length & 0xFF])
        length >>= 8
    return int(f"{zlib.crc32(data.translate(_REVERSED), 0xFFFFFFFF):032b}"[::-1], 2)
