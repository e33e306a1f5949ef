"""Input of a process that may not have arrived yet: kept, to be sent again over the next connection."""

from __future__ import annotations

KEPT_BYTES_MAX = 1 << 20


class KeptInput:
    """The end of the input of one process, by offset; the beginning goes as the agent says that it has arrived.

    Attributes:
        sent: How much of it the current connection has been given, or needs not be given.
        ended: Whether its end has been read.
        is_complete: Whether `resume` can work: nothing that may be asked for was dropped.
    """

    def __init__(self) -> None:
        self.sent = 0
        self.ended = False
        self.is_complete = True
        self._start = 0
        self._kept = bytearray()
        self._arrivals_are_told = False

    @property
    def end(self) -> int:
        """How much there was in all."""
        return self._start + len(self._kept)

    @property
    def has_room(self) -> bool:
        """Whether more may be added now. Where an agent does not tell what arrives, always."""
        return len(self._kept) < KEPT_BYTES_MAX or not self._arrivals_are_told

    def add(self, data: bytes) -> None:
        """Add what was read; nothing is its end."""
        self.ended = self.ended or not data
        self._kept += data
        if not self._arrivals_are_told and (len(self._kept) > KEPT_BYTES_MAX or not self.is_complete):
            self.is_complete = False
            self._drop(self.sent)

    def take(self, size: int) -> bytes:
        """Return at most *size* bytes that are to be sent next."""
        at = self.sent - self._start
        data = bytes(self._kept[at : at + size])
        self.sent += len(data)
        return data

    def begin(self, *, told: bool) -> None:
        """The process has begun; *told*: the agent will tell what arrives. If not, nothing can be sent again."""
        self._arrivals_are_told = told
        if not told:
            self.is_complete = self.end == 0

    def resume(self, arrived: int | None) -> bool:
        """Another connection begins, to a process that has had *arrived* bytes, or takes none any more.

        Return whether nothing is lost: of what it has not had all is still here, and nobody else gave it any.
        """
        if arrived is None or not self._start <= arrived <= self.end:
            self.sent = self.end
            return arrived is None
        self.sent = arrived
        return True

    def arrived(self, end: int) -> None:
        """Forget what has arrived for good."""
        self._drop(min(end, self.sent))

    def _drop(self, end: int) -> None:
        if end > self._start:
            del self._kept[: end - self._start]
            self._start = end
