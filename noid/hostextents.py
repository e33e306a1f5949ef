"""How much of the disk files occupy, and how much of that they share with others: by FIEMAP, and where they lie."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

_FS_IOC_FIEMAP = 0xC020660B  # _IOWR('f', 11, struct fiemap), linux/fiemap.h
_FIEMAP_FLAG_SYNC = 0x1
_FIEMAP_EXTENT_LAST = 0x1
_FIEMAP_EXTENT_UNPLACED = 0x2 | 0x4 | 0x200  # UNKNOWN, DELALLOC, DATA_INLINE
_FIEMAP_EXTENT_SHARED = 0x2000
_FIEMAP_HEADER = struct.Struct("=QQIIII")
_FIEMAP_EXTENT = struct.Struct("=QQQ16xI12x")
_FIEMAP_BATCH = 512
# What the kernel says when a filesystem cannot tell.
_NO_FIEMAP = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.ENOSYS})


def extent_bytes(path: Path) -> tuple[int, int]:
    """Return how many bytes of *path* only it occupies, and how many it shares with other files (by FIEMAP).

    Writes the file's dirty pages first: where they will lie is not decided before. A filesystem without FIEMAP counts
    everything it has allocated as unique. A file with several hard links is one file here.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        extents = _extents(fd, _FIEMAP_FLAG_SYNC)
        if extents is None:
            return os.fstat(fd).st_blocks * 512, 0
        shared_bytes = sum(extent.length for extent in extents if extent.flags & _FIEMAP_EXTENT_SHARED)
        return sum(extent.length for extent in extents) - shared_bytes, shared_bytes
    finally:
        os.close(fd)


def occupied_bytes(paths: Iterable[Path], beside: Iterable[Path] = ()) -> int:
    """Return how many bytes the files *paths* occupy together, without those they share with the files *beside*.

    What several of them share, by a hard link or as common blocks, counts once. Nothing is written to the disk for it:
    dirty pages whose place is not decided yet count as bytes of their file alone. A filesystem without FIEMAP knows of
    no shared blocks. Files that go away meanwhile count nothing.
    """
    seen: set[tuple[int, int]] = set()
    other_spans, _ = _spans(beside, seen)
    spans, loose_bytes = _spans(paths, seen)
    shared = sum(end - start for start, end in _union(other_spans))
    return sum(end - start for start, end in _union([*spans, *other_spans])) - shared + loose_bytes


def _spans(paths: Iterable[Path], seen: set[tuple[int, int]]) -> tuple[list[tuple[int, int]], int]:
    """Return where on the disk *paths* lie, and how much of them has no place. Inodes in *seen* are left out."""
    spans, loose_bytes = [], 0
    for path in paths:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            continue
        try:
            facts = os.fstat(fd)
            if (facts.st_dev, facts.st_ino) in seen or not stat.S_ISREG(facts.st_mode):
                continue
            seen.add((facts.st_dev, facts.st_ino))
            extents = _extents(fd, 0)
            if extents is None:
                loose_bytes += facts.st_blocks * 512
                continue
            for extent in extents:
                if extent.flags & _FIEMAP_EXTENT_UNPLACED:
                    loose_bytes += extent.length
                else:
                    spans.append((extent.physical, extent.physical + extent.length))
        finally:
            os.close(fd)
    return spans, loose_bytes


def _union(spans: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield what *spans* cover, each place once."""
    current: tuple[int, int] | None = None
    for start, end in sorted(spans):
        if current is None or start > current[1]:
            if current is not None:
                yield current
            current = start, end
        else:
            current = current[0], max(end, current[1])
    if current is not None:
        yield current


class _Extent(NamedTuple):
    physical: int
    length: int
    flags: int


def _extents(fd: int, flags: int) -> list[_Extent] | None:
    """Return where the file lies (FIEMAP), or None where the filesystem does not tell."""
    found: list[_Extent] = []
    start = 0
    while True:
        request = bytearray(_FIEMAP_HEADER.size + _FIEMAP_BATCH * _FIEMAP_EXTENT.size)
        _FIEMAP_HEADER.pack_into(request, 0, start, (1 << 64) - 1 - start, flags, 0, _FIEMAP_BATCH, 0)
        try:
            fcntl.ioctl(fd, _FS_IOC_FIEMAP, request)
        except OSError as error:
            if error.errno not in _NO_FIEMAP:
                raise
            return None
        mapped = _FIEMAP_HEADER.unpack_from(request, 0)[3]
        of_last = _FIEMAP_EXTENT_LAST
        for index in range(mapped):
            logical, physical, length, of_last = _FIEMAP_EXTENT.unpack_from(
                request, _FIEMAP_HEADER.size + index * _FIEMAP_EXTENT.size
            )
            start = logical + length
            found.append(_Extent(physical, length, of_last))
        if of_last & _FIEMAP_EXTENT_LAST:
            return found
