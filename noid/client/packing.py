"""Writes a local directory, or one file, as a tar stream."""

from __future__ import annotations

import errno
import os
import posixpath
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from noid.client import tarstream
from noid.client.tarstream import DIRECTORY, FILE, HARD_LINK, SYMLINK, local_entry, shown
from noid.errors import NoidError

PIECE_BYTES = 256 * 1024
DEPTH_MAX = 200
_WHY = {stat.S_IFSOCK: "a socket", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


class Packing:
    """A local tree as a tar stream: `pieces` yields it.

    *leave_out* is called with a line for each thing that cannot be read, or is no file, directory or link.
    """

    def __init__(self, path: str, leave_out: Callable[[str], None]) -> None:
        self._path = os.fsencode(path)
        self._leave_out = leave_out
        self._links: dict[tuple[int, int], bytes] = {}

    def pieces(self, name: str | None = None) -> Iterator[bytes]:
        """Yield the stream: of a directory what is below it, of a file one entry called *name*.

        Raises:
            NoidError: the top itself cannot be read.
        """
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        except OSError as error:
            raise NoidError(f"cannot read {shown(self._path)}: {error.strerror}.") from error
        try:
            status = os.fstat(descriptor)
            if stat.S_ISDIR(status.st_mode):
                yield from self._directory(descriptor, b"", status)
            else:
                yield from self._file(descriptor, os.fsencode(name or posixpath.basename(self._path)), status)
        finally:
            os.close(descriptor)
        yield tarstream.END

    def _directory(self, descriptor: int, path: bytes, status: os.stat_result) -> Iterator[bytes]:
        yield tarstream.headers_of(local_entry((path or b".") + b"/", status, DIRECTORY))
        if path.count(b"/") >= DEPTH_MAX:
            self._leave_out(f"{shown(path)}: too many directories below each other")
            return
        for name in sorted(os.fsencode(text) for text in os.listdir(descriptor)):
            below = path + b"/" + name if path else name
            try:
                yield from self._child(descriptor, name, below)
            except OSError as error:
                if error.errno != errno.ENOENT:  # gone since we read its name
                    self._leave_out(f"{shown(below)}: {error.strerror}")

    def _child(self, directory: int, name: bytes, path: bytes) -> Iterator[bytes]:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        kind = stat.S_IFMT(status.st_mode)
        if kind in _WHY:
            self._leave_out(f"{shown(path)}: {_WHY[kind]}")
            return
        if kind != stat.S_IFDIR and status.st_nlink > 1:
            earlier = self._links.setdefault((status.st_dev, status.st_ino), path)
            if earlier != path:
                yield tarstream.headers_of(local_entry(path, status, HARD_LINK, earlier))
                return
        if kind == stat.S_IFLNK:
            target = os.readlink(name, dir_fd=directory)
            yield tarstream.headers_of(local_entry(path, status, SYMLINK, os.fsencode(target)))
            return
        descriptor = os.open(
            name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY, dir_fd=directory
        )
        try:
            status = os.fstat(descriptor)
            if stat.S_ISDIR(status.st_mode):
                yield from self._directory(descriptor, path, status)
            elif stat.S_ISREG(status.st_mode):
                yield from self._file(descriptor, path, status)
        finally:
            os.close(descriptor)

    def _file(self, descriptor: int, path: bytes, status: os.stat_result) -> Iterator[bytes]:
        entry = local_entry(path, status, FILE)
        entry.segments = segments_of(descriptor, status)
        yield tarstream.headers_of(entry)
        pieces = [(0, entry.size)] if entry.segments is None else entry.segments
        for at, length in pieces:
            yield from self._data(descriptor, at, length, path)
        yield tarstream.padding(sum(length for _, length in pieces))

    def _data(self, descriptor: int, at: int, length: int, path: bytes) -> Iterator[bytes]:
        """Yield *length* bytes; what the file no longer has is zeros, because its size has been said."""
        end = at + length
        trouble = ""
        while at < end:
            try:
                piece = os.pread(descriptor, min(end - at, PIECE_BYTES), at)
            except OSError as error:
                trouble, piece = error.strerror or str(error), b""
            if not piece:
                self._leave_out(f"{shown(path)}: {trouble or 'it shrank while it was read'}; the rest is zeros")
                while at < end:
                    piece = bytes(min(end - at, PIECE_BYTES))
                    at += len(piece)
                    yield piece
                return
            at += len(piece)
            yield piece


def segments_of(descriptor: int, status: os.stat_result) -> list[tuple[int, int]] | None:
    """Return where the data of a sparse file is: offset and length; the last ends where the file does. Else None."""
    size = status.st_size
    if status.st_blocks * 512 >= size:
        return None
    segments: list[tuple[int, int]] = []
    at = 0
    while at < size:
        try:
            at = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # no more data; anything else: a file system that cannot tell
                return None
            break
        last = len(segments) == tarstream.SEGMENTS_MAX - 2
        end = size if last else min(os.lseek(descriptor, at, os.SEEK_HOLE), size)
        segments.append((at, end - at))
        at = end
    if not segments or sum(segments[-1]) < size:
        segments.append((size, 0))
    return segments


def is_sparse(path: str) -> bool:
    """Return whether *path* is a file with so many holes that they are worth keeping."""
    status = Path(path).stat()
    return stat.S_ISREG(status.st_mode) and status.st_size - status.st_blocks * 512 >= 64 * 1024
