"""Writes a tar stream that came out of a guest into a local directory, and nowhere else.

Whoever wrote the stream is not trusted:

- a path is entered component by component, relative to its parent's descriptor, and no link is ever followed;
- absolute paths, ``..``, devices and pipes are left out, and so are symlinks that lead out of the directory, because
  what follows them later would not know where they came from;
- set-user-id and set-group-id bits are dropped, and owners too unless they were asked for by root;
- entries, bytes (holes count) and depth have limits; what is kept in memory is bounded (`noid.client.tarstream`);
- a file appears under its name when it is complete, by a rename: no transfer that breaks leaves half of one there, and
  nothing that was there before is written into.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from noid.client.tarstream import DIRECTORY, FILE, HARD_LINK, SYMLINK, Entry, TarReader, shown
from noid.errors import BackendError, NoidError, NoSpace, TooLarge

DEPTH_MAX = 256
_PERMISSIONS = 0o1777  # with the sticky bit, which gives nobody anything; without the set-id bits, which do
_FATAL = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
_ENTER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much a stream may write."""

    entries: int = 1_000_000
    size: int = 64 << 30


@dataclass(slots=True, kw_only=True)
class _Level:
    descriptor: int
    name: bytes
    entry: Entry | None = None


class _LeftOut(Exception):
    """This entry is not for us; the text says why."""


class Unpacking:
    """Writes into *directory*, a descriptor that stays the caller's.

    *leave_out* is called with a line for each thing that is left out. *owners* are restored only by root.
    """

    def __init__(self, directory: int, limits: Limits, leave_out: Callable[[str], None], *, owners: bool) -> None:
        self.entries = 0
        self.size = 0
        self._limits = limits
        self._leave_out = leave_out
        self._owners = owners and os.geteuid() == 0
        self._levels = [_Level(descriptor=os.dup(directory), name=b"")]
        self._temporary = b".%d-%s.noid-part" % (os.getpid(), os.urandom(4).hex().encode())

    def run(self, stream: TarReader, *, only_file: bytes | None = None) -> None:
        """Write all of *stream*; or, of a stream that must have just one file, that one under the name *only_file*.

        Raises:
            NoidError: the stream broke off, a limit was passed, or the disk is full. What was written before stays.
        """
        try:
            for entry in stream:
                self._count(entry)
                if only_file is not None:
                    if entry.kind != FILE or self.entries > 1:
                        raise BackendError("the guest sent something other than the one file it was asked for.")
                    entry.path = only_file
                try:
                    self._make(entry, stream.data())
                except _LeftOut as error:
                    self._leave_out(f"{shown(entry.path)}: {error}")
                except OSError as error:
                    self._take_failure(entry, error)
        finally:
            while self._levels:
                self._leave()

    def _count(self, entry: Entry) -> None:
        self.entries += 1
        self.size += entry.size if entry.kind == FILE else 0
        if self.entries > self._limits.entries:
            raise TooLarge(
                f"the copy has more than {self._limits.entries} entries. What came before stays. See --max-entries."
            )
        if self.size > self._limits.size:
            raise TooLarge(
                f"the copy has more than {self._limits.size} bytes, holes included. What came before stays. See "
                "--max-bytes."
            )

    def _take_failure(self, entry: Entry, error: OSError) -> None:
        if error.errno in _FATAL:
            kind = NoSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else NoidError
            raise kind(
                f"cannot write {shown(entry.path)}: {error.strerror}. {self.entries - 1} entries were written before."
            ) from error
        is_link = error.errno == errno.ELOOP
        self._leave_out(
            f"{shown(entry.path)}: "
            + ("a link is in its way, and links are not followed" if is_link else str(error.strerror))
        )

    # --- where we are -----------------------------------------------------------------------------------------------

    def _leave(self) -> None:
        """Leave a directory. Only now its attributes are set: what was put into it has changed its time."""
        level = self._levels.pop()
        try:
            if level.entry is not None:
                self._dress(level.descriptor, level.entry)
        except OSError as error:
            self._leave_out(f"{shown(level.entry.path if level.entry else level.name)}: {error.strerror}")
        finally:
            os.close(level.descriptor)

    def _go_to(self, parts: list[bytes]) -> int:
        """Enter the directory *parts*, making what is missing, and return its descriptor."""
        if len(parts) > DEPTH_MAX:
            raise _LeftOut("too many directories below each other")
        common = 0
        for level, name in zip(self._levels[1:], parts, strict=False):
            if level.name != name:
                break
            common += 1
        while len(self._levels) > common + 1:
            self._leave()
        for name in parts[common:]:
            parent = self._levels[-1].descriptor
            try:
                descriptor = _enter(parent, name)
            except FileNotFoundError:
                os.mkdir(name, 0o755, dir_fd=parent)
                descriptor = _enter(parent, name)
            self._levels.append(_Level(descriptor=descriptor, name=name))
        return self._levels[-1].descriptor

    # --- entries ----------------------------------------------------------------------------------------------------

    def _make(self, entry: Entry, data: Iterator[bytes]) -> None:
        parts = _parts(entry.path)
        if entry.kind == DIRECTORY:
            self._go_to(parts)
            self._levels[-1].entry = entry
            return
        if entry.kind not in (FILE, SYMLINK, HARD_LINK):
            raise _LeftOut({b"3": "a device", b"4": "a device", b"6": "a pipe"}.get(entry.kind, "of an unknown kind"))
        if not parts:
            raise _LeftOut("it has no name")
        if entry.kind == SYMLINK:
            _check_target(entry.link, len(parts) - 1)
        directory = self._go_to(parts[:-1])
        try:
            if entry.kind == FILE:
                self._make_file(directory, entry, data)
            elif entry.kind == SYMLINK:
                os.symlink(entry.link, self._temporary, dir_fd=directory)
                os.utime(self._temporary, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=directory, follow_symlinks=False)
            else:
                self._make_hard_link(directory, entry)
            os.rename(self._temporary, parts[-1], src_dir_fd=directory, dst_dir_fd=directory)
        finally:
            with contextlib.suppress(FileNotFoundError):  # renamed; it stays if both were names of one file
                os.unlink(self._temporary, dir_fd=directory)

    def _make_file(self, directory: int, entry: Entry, data: Iterator[bytes]) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self._temporary, flags, 0o600, dir_fd=directory)
        try:
            pieces = iter(data)
            if entry.segments is None:
                for piece in pieces:
                    _write(descriptor, piece)
            else:
                _write_segments(descriptor, entry.segments, pieces)
                os.ftruncate(descriptor, entry.size)
            self._dress(descriptor, entry)
        finally:
            os.close(descriptor)

    def _make_hard_link(self, directory: int, entry: Entry) -> None:
        *above, last = _parts(entry.link) or [b""]
        if not last:
            raise _LeftOut("a hard link to nothing")
        descriptor = os.dup(self._levels[0].descriptor)
        try:
            for name in above:
                below = _enter(descriptor, name)
                os.close(descriptor)
                descriptor = below
            if not stat.S_ISREG(os.stat(last, dir_fd=descriptor, follow_symlinks=False).st_mode):
                raise _LeftOut("a hard link to what is no file")
            os.link(last, self._temporary, src_dir_fd=descriptor, dst_dir_fd=directory, follow_symlinks=False)
        finally:
            os.close(descriptor)

    def _dress(self, descriptor: int, entry: Entry) -> None:
        if self._owners:
            os.fchown(descriptor, entry.uid, entry.gid)
        os.fchmod(descriptor, entry.mode & _PERMISSIONS)
        os.utime(descriptor, ns=(entry.mtime_ns, entry.mtime_ns))


def _enter(directory: int, name: bytes) -> int:
    try:
        return os.open(name, _ENTER, dir_fd=directory)
    except NotADirectoryError:
        if stat.S_ISLNK(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from None
        raise


def _parts(path: bytes) -> list[bytes]:
    if path.startswith(b"/"):
        raise _LeftOut("an absolute path")
    parts = [part for part in path.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise _LeftOut("a path that leads out of the tree")
    return parts


def _check_target(target: bytes, depth: int) -> None:
    """Refuse a symlink that leads out, *depth* directories below the top.

    ``..`` is allowed at the beginning only: the directories above a link are real ones, because we entered them. Behind
    the name of another link it could lead anywhere.
    """
    parts = [part for part in target.split(b"/") if part not in (b"", b".")]
    above = 0
    while above < len(parts) and parts[above] == b"..":
        above += 1
    if not target or target.startswith(b"/") or above > depth or b".." in parts[above:]:
        raise _LeftOut(f"a link that leads out of the tree, to {shown(target)}")


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _write_segments(descriptor: int, segments: list[tuple[int, int]], pieces: Iterator[bytes]) -> None:
    held = memoryview(b"")
    for at, length in segments:
        os.lseek(descriptor, at, os.SEEK_SET)
        while length:
            held = held or memoryview(next(pieces))
            _write(descriptor, bytes(held[:length]))
            taken = min(length, len(held))
            held, length = held[taken:], length - taken
