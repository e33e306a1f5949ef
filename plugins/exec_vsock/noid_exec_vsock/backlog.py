"""What was heard of a process and not yet received: bytes, where their stream changes, where some are missing.

A guest may change the stream with every byte. What that costs beyond the bytes themselves must be bounded, so a run is
one number in an array: its length, and which stream it is of.
"""

from __future__ import annotations

from array import array

from noid.core.model.guest_processes import OutputChunk
from noid.core.model.processes import Gap


class Backlog:
    """The bytes of a process' log from `start` up to `end`.

    Attributes:
        start: Offset of what is taken next.
        end: Offset of what comes next.
    """

    def __init__(self, start: int) -> None:
        self.start = self.end = start
        self._data = bytearray()
        self._runs = array("Q")  # length << 1 | is_stderr
        self._first = 0
        self._gap: Gap | None = None

    def __bool__(self) -> bool:
        return self._gap is not None or self.start < self.end

    @property
    def size(self) -> int:
        """How many bytes are held."""
        return len(self._data)

    def skip_to(self, offset: int) -> None:
        """Begin at *offset* instead, before anything was put in; what lies between is taken as a `Gap`."""
        if offset > self.end:
            self._gap = Gap(start=self.end, end=offset)
            self.start = self.end = offset

    def put(self, stream: int, data: bytes) -> None:
        """Append *data* of *stream*, 1 or 2."""
        if not data:
            return
        is_stderr = stream - 1
        if self._first < len(self._runs) and self._runs[-1] & 1 == is_stderr:
            self._runs[-1] += len(data) << 1
        else:
            self._runs.append(len(data) << 1 | is_stderr)
        self._data += data
        self.end += len(data)

    def take(self) -> OutputChunk | Gap:
        """Remove and return what is first: a gap, or all bytes up to the next change of stream. Not while empty."""
        if self._gap is not None:
            gap, self._gap = self._gap, None
            return gap
        run = self._runs[self._first]
        size = run >> 1
        chunk = OutputChunk(stream=(run & 1) + 1, data=bytes(self._data[:size]), offset=self.start)
        del self._data[:size]
        self.start += size
        self._first += 1
        if 2 * self._first >= len(self._runs):
            del self._runs[: self._first]
            self._first = 0
        return chunk

    def clear(self) -> None:
        """Forget everything."""
        self.start = self.end
        self._data.clear()
        del self._runs[:]
        self._first = 0
        self._gap = None
