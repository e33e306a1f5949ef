"""Tells when a file has grown: one inotify descriptor for the whole agent, open only while somebody waits."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import trio

from noid.errors import DependencyDown, NotFound

#: What is printed byte by byte is looked at in pieces: at most this often, whoever prints and however much.
GATHER_SECS = 0.01

_IN_MODIFY = 0x2
_IN_Q_OVERFLOW = 0x4000
_EVENT = struct.Struct("iIII")
_READ_BYTES = 65536

_libc = ctypes.CDLL(None, use_errno=True)
_libc.inotify_add_watch.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32)


class Changes:
    """How often something has changed, and a way to wait for the next time. Any number of tasks may wait.

    Read `count`, look at the thing, and if there was nothing new wait `beyond` that count: no change is missed.
    """

    def __init__(self) -> None:
        self.count = 0
        self._waiting = trio.lowlevel.ParkingLot()

    def note(self) -> None:
        """Say that it has changed."""
        self.count += 1
        self._waiting.unpark_all()

    async def beyond(self, count: int) -> None:
        """Return once `count` is greater than *count*."""
        await trio.lowlevel.checkpoint()
        while self.count <= count:
            await self._waiting.park()


@dataclass(slots=True)
class _Watch:
    path: Path
    changes: Changes = field(default_factory=Changes)
    watchers: int = 0


class FileWatches:
    """The files that are watched. *nursery* runs the one task that listens to the kernel, while there are any."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._fd = -1
        self._listening: trio.CancelScope | None = None
        self._watches: dict[int, _Watch] = {}

    @contextlib.contextmanager
    def watching(self, path: Path) -> Iterator[Changes]:
        """Yield what tells of *path*'s changes. A file that is replaced is another file, of which nothing is told.

        Raises:
            NotFound: there is no such file.
            DependencyDown: the kernel lets this user watch no more files.
        """
        if self._fd < 0:
            self._fd = _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), path)
        try:
            number = _checked(_libc.inotify_add_watch(self._fd, os.fsencode(path), _IN_MODIFY), path)
            watch = self._watches.setdefault(number, _Watch(path))
        except BaseException:
            self._close_if_idle()
            raise
        watch.watchers += 1
        if self._listening is None:
            self._listening = trio.CancelScope()
            self._nursery.start_soon(self._listen, self._fd, self._listening, name="file watches")
        try:
            yield watch.changes
        finally:
            watch.watchers -= 1
            if watch.watchers == 0:
                del self._watches[number]
                _libc.inotify_rm_watch(self._fd, number)  # it fails where the file is gone, and its watch with it
                self._close_if_idle()

    def note(self, path: Path) -> None:
        """Wake whoever watches *path*, for a reason of another kind."""
        for watch in self._watches.values():
            if watch.path == path:
                watch.changes.note()

    def _close_if_idle(self) -> None:
        if not self._watches and self._fd >= 0:
            if self._listening is not None:
                self._listening.cancel()
                self._listening = None
            trio.lowlevel.notify_closing(self._fd)
            os.close(self._fd)
            self._fd = -1

    async def _listen(self, fd: int, scope: trio.CancelScope) -> None:
        """Hand on what the kernel tells, until `_close_if_idle` cancels *scope*."""
        with scope:
            while True:
                try:
                    await trio.lowlevel.wait_readable(fd)
                except trio.ClosedResourceError:
                    return
                if scope.cancel_called:
                    return  # closed after this task was woken: the number may be another file's by now
                self._take(os.read(fd, _READ_BYTES))
                await trio.sleep(GATHER_SECS)

    def _take(self, events: bytes) -> None:
        offset = 0
        while offset < len(events):
            number, mask, _, name_bytes = _EVENT.unpack_from(events, offset)
            offset += _EVENT.size + name_bytes
            if mask & _IN_Q_OVERFLOW:
                for watch in self._watches.values():
                    watch.changes.note()
            elif (told := self._watches.get(number)) is not None:
                told.changes.note()


def _checked(number: int, path: Path) -> int:
    """Return *number*, which libc returned, if it is no failure."""
    if number >= 0:
        return number
    error = OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    if isinstance(error, FileNotFoundError):
        raise NotFound(f"there is no file {path}.") from error
    raise DependencyDown(
        f"{path} cannot be watched: {error.strerror}. Other programs of this user may watch too many files; raise "
        "fs.inotify.max_user_instances and fs.inotify.max_user_watches with sysctl."
    ) from error
