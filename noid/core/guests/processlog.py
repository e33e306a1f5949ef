"""What a process in a guest wrote, as the host keeps it: the latest in memory, what is older in files; the oldest goes.

A log is numbered from 0 over both streams. On disk it is a row of *segments*, ``<name>.<number>``, each a sequence of
records ``offset u64, stream u8, length u32, bytes``; stream 0 is a gap, its eight bytes the offset behind it. Records
say where they belong, so a segment needs no second file that could disagree with it; what a crash cut off at the end of
one is dropped when it is opened. A full segment is followed by a new one, and the oldest is removed.

Nothing is written before there is more than memory shall hold, or `ProcessLog.save` is called: a process that says
little and ends costs no file.
"""

from __future__ import annotations

import json
import logging
import struct
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from noid import hostfs
from noid.core.model.guest_processes import OutputChunk
from noid.core.model.processes import Gap
from noid.errors import Damaged

logger = logging.getLogger(__name__)

SEGMENT_BYTES = 1 << 20
SEGMENTS_MAX = 3
"""Kept of every process: at least two full segments; on disk at most three and the record that overfills one."""
MEMORY_BYTES = 128 << 10
MEMORY_CHUNKS = 2048
JOINED_BYTES = 4096
RECORD_BYTES_MAX = 1 << 16
INDEX_EVERY_BYTES = 1 << 15
DESCRIPTION_BYTES_MAX = 1 << 16

_HEADER = struct.Struct("<QBI")
_OFFSET = struct.Struct("<Q")
_GAP = 0

Event = OutputChunk | Gap


@dataclass(slots=True)
class _Segment:
    """A file of records. *index* are (offset, position) of some of them, the first included."""

    path: Path
    size: int = 0
    index: list[tuple[int, int]] = field(default_factory=list)

    def note(self, offset: int, position: int) -> None:
        if not self.index or position - self.index[-1][1] >= INDEX_EVERY_BYTES:
            self.index.append((offset, position))


class ProcessLog:
    """The log of one process. One task appends and saves; any number read.

    Attributes:
        start: The first byte that is kept.
        end: Where the next one will be.
    """

    def __init__(
        self, directory: Path, name: str, *, unsaved_bytes: int = MEMORY_BYTES, has_files: bool = False
    ) -> None:
        self.start = self.end = 0
        self._directory = directory
        self._name = name
        self._unsaved_bytes_max = min(unsaved_bytes, MEMORY_BYTES)
        self._recent: deque[Event] = deque()
        self._recent_bytes = 0
        self._saved_end = 0
        self._segments: list[_Segment] = []
        self._next_number = 0
        self._saving = trio.Lock()
        self._broken = False
        self._removed = False
        self._has_files = has_files  # perhaps; or only a description

    @property
    def unsaved_bytes(self) -> int:
        """How much would be lost with this process. The guest still has it."""
        return self.end - self._saved_end

    @property
    def is_on_disk(self) -> bool:
        """Whether anything was ever saved."""
        return bool(self._segments)

    def append(self, event: Event) -> bool:
        """Add what came next, and return whether it is time for `save`.

        What was there already is cut off; what is missing in between is a gap.
        """
        if isinstance(event, Gap):
            if event.end > self.end:
                self._push(Gap(start=self.end, end=event.end))
        elif event.end > self.end:
            if event.offset > self.end:
                self._push(Gap(start=self.end, end=event.offset))
            known = self.end - event.offset
            data = event.data[known:] if known else event.data
            self._push(OutputChunk(stream=event.stream, data=data, offset=self.end))
        return self.unsaved_bytes >= self._unsaved_bytes_max or len(self._recent) > MEMORY_CHUNKS

    def _push(self, event: Event) -> None:
        last = self._recent[-1] if self._recent else None
        if isinstance(event, OutputChunk):
            self._recent_bytes += len(event.data)
            if (
                isinstance(last, OutputChunk)
                and last.stream == event.stream
                and len(last.data) < JOINED_BYTES
                and last.offset >= self._saved_end
            ):
                self._recent[-1] = OutputChunk(stream=last.stream, data=last.data + event.data, offset=last.offset)
                self.end = event.end
                return
        self._recent.append(event)
        self.end = event.end

    # --- reading ------------------------------------------------------------------------------------------------------

    async def read(self, offset: int, limit: int = RECORD_BYTES_MAX) -> list[Event]:
        """Return what follows *offset*, about *limit* bytes; nothing at the end. What is gone comes as a gap."""
        while offset < self.end:
            if offset < self.start:
                return [Gap(start=offset, end=self.start)]
            if self._recent and offset >= _start_of(self._recent[0]):
                return _cut(self._recent, offset, limit)
            events = await trio.to_thread.run_sync(self._read_segments, list(self._segments), offset, limit)
            if events:
                return events
            if offset >= self.start and not (self._recent and offset >= _start_of(self._recent[0])):
                # Nobody has it: a segment was lost. What follows is the next thing there is.
                following = [s.index[0][0] for s in self._segments if s.index and s.index[0][0] > offset]
                following += [_start_of(self._recent[0])] if self._recent else []
                return [Gap(start=offset, end=min(following, default=self.end))]
        await trio.lowlevel.checkpoint()
        return []

    def _read_segments(self, segments: list[_Segment], offset: int, limit: int) -> list[Event]:
        """Read from the segment that has *offset*. Blocks."""
        for segment in reversed(segments):
            if not segment.index or segment.index[0][0] > offset:
                continue
            position = max(at for known, at in segment.index if known <= offset)
            try:
                with segment.path.open("rb") as file:
                    file.seek(position)
                    raw = file.read(min(segment.size - position, limit + 2 * INDEX_EVERY_BYTES + RECORD_BYTES_MAX))
            except OSError:
                return []  # removed meanwhile
            return _cut([event for event, _ in _parse(raw)], offset, limit)
        return []

    # --- keeping ------------------------------------------------------------------------------------------------------

    async def save(self) -> None:
        """Write to disk what is not there yet, then let memory and disk go back to their bounds.

        A disk that is full or broken is logged once, and from then on memory is all there is: the process goes on.
        """
        async with self._saving:
            if not self._broken and not self._removed:
                batch = _cut(self._recent, self._saved_end, self.end)
                try:
                    await trio.to_thread.run_sync(self._write, batch)
                except OSError as error:
                    logger.warning("the output of process %s is kept in memory only: %s", self._name, error)
                    self._broken = True
                else:
                    self._saved_end = max(self._saved_end, batch[-1].end if batch else 0)
            if self._broken or self._removed:
                self._saved_end = self.end
            while len(self._recent) > 1 and (
                self._recent_bytes > MEMORY_BYTES or len(self._recent) > MEMORY_CHUNKS // 2
            ):
                event = self._recent[0]
                if event.end > self._saved_end:
                    break
                self._recent.popleft()
                self._recent_bytes -= len(event.data) if isinstance(event, OutputChunk) else 0
            self._find_start()

    def _find_start(self) -> None:
        first = next((segment.index[0][0] for segment in self._segments if segment.index), None)
        recent = _start_of(self._recent[0]) if self._recent else self.end
        self.start = max(self.start, recent if first is None or self._broken else min(first, recent))

    def _write(self, batch: list[Event]) -> None:
        """Append records. Blocks."""
        at = 0
        while at < len(batch):
            segment = self._segments[-1] if self._segments else None
            if segment is None or segment.size >= SEGMENT_BYTES:
                segment = self._new_segment()
            raw = bytearray()
            while at < len(batch) and segment.size + len(raw) < SEGMENT_BYTES:
                event, joined = batch[at], bytearray()
                at += 1
                if isinstance(event, Gap):
                    segment.note(event.start, segment.size + len(raw))
                    raw += _HEADER.pack(event.start, _GAP, _OFFSET.size) + _OFFSET.pack(event.end)
                    continue
                joined += event.data
                while at < len(batch) and len(joined) < RECORD_BYTES_MAX:
                    following = batch[at]
                    if not isinstance(following, OutputChunk) or following.stream != event.stream:
                        break
                    joined += following.data
                    at += 1
                for start in range(0, len(joined), RECORD_BYTES_MAX):  # what reading counts on to get a whole one
                    piece = joined[start : start + RECORD_BYTES_MAX]
                    segment.note(event.offset + start, segment.size + len(raw))
                    raw += _HEADER.pack(event.offset + start, event.stream, len(piece)) + piece
            with segment.path.open("ab") as file:
                file.write(raw)
            segment.size += len(raw)

    def _new_segment(self) -> _Segment:
        self._has_files = True
        self._directory.mkdir(mode=0o700, exist_ok=True)
        segment = _Segment(self._directory / f"{self._name}.{self._next_number:08d}")
        self._next_number += 1
        segments = [*self._segments, segment]
        for old in segments[:-SEGMENTS_MAX]:
            old.path.unlink(missing_ok=True)
        self._segments = segments[-SEGMENTS_MAX:]
        return segment

    async def describe(self, fields: dict[str, Any]) -> None:
        """Put *fields* beside the log, for `descriptions` of a later agent. A disk that is full is only logged."""

        def write() -> None:
            self._has_files = True
            self._directory.mkdir(mode=0o700, exist_ok=True)
            partial = self._directory / f"{self._name}.json.partial"
            partial.write_text(json.dumps(fields))
            partial.rename(self._directory / f"{self._name}.json")

        async with self._saving:
            if self._removed:
                return
            try:
                await trio.to_thread.run_sync(write)
            except OSError as error:
                logger.warning("process %s is not described on disk: %s", self._name, error)

    def abandon(self) -> None:
        """Write nothing any more: the directory is about to go."""
        self._removed = True

    async def remove(self) -> None:
        """Remove every file of this log. Nothing is written any more."""
        self._removed = True
        async with self._saving:

            def remove() -> None:
                for path in self._directory.glob(f"{self._name}.*"):
                    path.unlink(missing_ok=True)

            if self._has_files:
                with hostfs.os_errors("removing a process' log"):
                    await trio.to_thread.run_sync(remove)

    # --- opening ------------------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, directory: Path, name: str, *, unsaved_bytes: int = MEMORY_BYTES) -> ProcessLog:
        """Return the log an earlier agent saved, without what a crash cut off; an empty one if there is none. Blocks.

        Raises:
            OSError: it cannot be read.
        """
        log = cls(directory, name, unsaved_bytes=unsaved_bytes, has_files=True)
        paths = sorted(p for p in directory.glob(f"{name}.*") if p.suffix[1:].isdigit())
        for path in paths[-SEGMENTS_MAX:]:
            raw = path.read_bytes()
            segment = _Segment(path)
            for event, position in _parse(raw):
                start = _start_of(event)
                if start < log.end:
                    break  # nothing of ours
                segment.note(start, position)
                segment.size = position + _HEADER.size + (len(event.data) if isinstance(event, OutputChunk) else 8)
                log.end = event.end
            if segment.size < len(raw):
                with path.open("r+b") as file:
                    file.truncate(segment.size)
            log._segments.append(segment)  # noqa: SLF001, RUF100  # its own class
        if paths:
            log._next_number = int(paths[-1].suffix[1:]) + 1
        log._saved_end = log.end
        log.start = log.end
        first = next((segment.index[0][0] for segment in log._segments if segment.index), None)
        log.start = log.end if first is None else first
        return log


def descriptions(directory: Path) -> dict[str, dict[str, Any]]:
    """Return by name what `ProcessLog.describe` put into *directory*. Blocks.

    Raises:
        Damaged: a description is none.
        OSError: the directory cannot be read.
    """
    found = {}
    for path in sorted(directory.glob("*.json")) if directory.is_dir() else ():
        try:
            fields = json.loads(path.read_bytes()[:DESCRIPTION_BYTES_MAX])
        except ValueError as error:
            raise Damaged(
                f"{path} is not what noid wrote: {error}. Remove it to lose nothing but this process."
            ) from error
        if isinstance(fields, dict):
            found[path.stem] = fields
    return found


def _start_of(event: Event) -> int:
    return event.start if isinstance(event, Gap) else event.offset


def _parse(raw: bytes) -> list[tuple[Event, int]]:
    """Return the whole records in *raw*, with their positions."""
    events: list[tuple[Event, int]] = []
    at = 0
    while at + _HEADER.size <= len(raw):
        offset, stream, length = _HEADER.unpack_from(raw, at)
        data = raw[at + _HEADER.size : at + _HEADER.size + length]
        if len(data) < length or stream not in (_GAP, 1, 2) or (stream == _GAP and length != _OFFSET.size):
            break
        if stream == _GAP:
            events.append((Gap(start=offset, end=_OFFSET.unpack(data)[0]), at))
        else:
            events.append((OutputChunk(stream=stream, data=data, offset=offset), at))
        at += _HEADER.size + length
    return events


def _cut(events: deque[Event] | list[Event], offset: int, limit: int) -> list[Event]:
    """Return of *events*, which have no holes, what lies behind *offset*, until there are *limit* bytes."""
    found: list[Event] = []
    size = 0
    for event in events:
        if event.end <= offset or size >= limit:
            continue
        if isinstance(event, Gap):
            found.append(Gap(start=max(event.start, offset), end=event.end))
            continue
        skipped = max(0, offset - event.offset)
        data = event.data[skipped:] if skipped else event.data
        found.append(OutputChunk(stream=event.stream, data=data, offset=event.offset + skipped))
        size += len(data)
    return found
