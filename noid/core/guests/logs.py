"""Logs: bytes numbered from the first one on, of which a part may be gone, read from anywhere and followed.

A log's readers never hold up its writer. What is no longer kept is told as a `Gap`, never left out in silence.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import trio

from noid.core.guests.filewatch import Changes, FileWatches
from noid.core.model.processes import Gap
from noid.errors import NotFound
from noid.hostfs import os_errors

PIECE_BYTES = 65536

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogExtent:
    """What there is of a log now: bytes 0 to *end*, without *gaps*. *growing* is false when nothing more can come."""

    end: int
    gaps: tuple[Gap, ...]
    growing: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LogPiece:
    """Bytes of a log. *offset* is of the first one; *stream* says which stream wrote them, where a log has several."""

    offset: int
    data: bytes = field(repr=False)
    stream: int = 1

    @property
    def end(self) -> int:
        """The offset of what follows."""
        return self.offset + len(self.data)


class Log(Protocol):
    """A log as its readers see it."""

    async def extent(self) -> LogExtent:
        """Return what there is.

        Raises:
            NotFound: the log is gone.
        """
        ...

    async def read(self, offset: int, limit: int) -> LogPiece | Gap | None:
        """Return up to *limit* bytes from *offset* on, or the gap there; None when the log ends there now."""
        ...

    def changes(self) -> AbstractContextManager[Changes]:
        """Yield what tells that `read` and `extent` may answer differently."""
        ...


class LogReader:
    """Reads *log* from *offset* on, up to where it ends now or, with *follow*, up to where it will ever end.

    One task at a time. Nothing is held for a reader: one that is slow finds a gap where the log's owner let go.
    """

    def __init__(self, log: Log, offset: int, changes: Changes | None) -> None:
        self._log = log
        self._changes = changes
        self.offset = offset
        """Where the next piece begins."""

    async def next(self, limit: int = PIECE_BYTES) -> LogPiece | Gap | None:
        """Return the next piece or gap, waiting for it when following; None at the end."""
        while True:
            seen = 0 if self._changes is None else self._changes.count
            growing = self._changes is not None and (await self._log.extent()).growing
            found = await self._log.read(self.offset, limit)
            if found is not None:
                self.offset = found.end
                return found
            if not growing or self._changes is None:
                return None
            await self._changes.beyond(seen)


class FileLog:
    """A file that only grows, whose parts were given back to the disk by punching holes: those are its gaps.

    What the file system knows is the whole truth about it, so it needs no book-keeping and survives everybody.
    """

    def __init__(self, path: Path, watches: FileWatches, growing: Callable[[], bool]) -> None:
        self.path = path
        self._watches = watches
        self._growing = growing

    async def extent(self) -> LogExtent:
        """See `Log.extent`."""
        growing = self._growing()  # first: what was printed before the end is then in what is read
        end, gaps = await trio.to_thread.run_sync(self._on_file, _extent)
        return LogExtent(end=end, gaps=gaps, growing=growing)

    async def read(self, offset: int, limit: int) -> LogPiece | Gap | None:
        """See `Log.read`."""
        return await trio.to_thread.run_sync(self._on_file, lambda fd: _read(fd, offset, limit))

    def changes(self) -> AbstractContextManager[Changes]:
        """See `Log.changes`."""
        return self._watches.watching(self.path)

    def note(self) -> None:
        """Tell its readers that it may have ended."""
        self._watches.note(self.path)

    def _on_file(self, act: Callable[[int], T]) -> T:
        with os_errors(f"reading the log {self.path.name}"):
            try:
                fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError as error:
                raise NotFound(f"the log {self.path.name} is gone, and its VM with it.") from error
            try:
                return act(fd)
            finally:
                os.close(fd)


def _read(fd: int, offset: int, limit: int) -> LogPiece | Gap | None:
    size = os.fstat(fd).st_size
    if offset >= size:
        return None
    if (begin := _data_from(fd, offset, size)) > offset:
        return Gap(start=offset, end=begin)
    data = os.pread(fd, min(limit, size - offset), offset)
    # Asked after reading: what was punched meanwhile may have been read as zeros.
    end = os.lseek(fd, offset, os.SEEK_HOLE)
    if end == offset:
        return Gap(start=offset, end=_data_from(fd, offset, size))
    return LogPiece(offset=offset, data=data[: end - offset])


def _extent(fd: int) -> tuple[int, tuple[Gap, ...]]:
    size = os.fstat(fd).st_size
    gaps = []
    offset = 0
    while offset < size and (hole := os.lseek(fd, offset, os.SEEK_HOLE)) < size:
        offset = _data_from(fd, hole, size)
        gaps.append(Gap(start=hole, end=offset))
    return size, tuple(gaps)


def _data_from(fd: int, offset: int, size: int) -> int:
    """Return where data begins at *offset* or behind it; *size* where there is none."""
    try:
        return min(os.lseek(fd, offset, os.SEEK_DATA), size)
    except OSError:  # ENXIO
        return size
