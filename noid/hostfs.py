"""File operations the standard library gets wrong for disk images: clone, copy with holes, publish, remove.

Every function here blocks; async callers use ``trio.to_thread.run_sync``. They raise plain `OSError`, so that callers
can tell one from another; `os_errors` turns what is left into noid's own at the edge of a backend.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from noid.errors import BackendError, NoSpace

_FICLONE = 0x40049409  # _IOW(0x94, 9, int), linux/fs.h
_FS_IOC_FIEMAP = 0xC020660B  # _IOWR('f', 11, struct fiemap), linux/fiemap.h
_FIEMAP_FLAG_SYNC = 0x1
_FIEMAP_EXTENT_LAST = 0x1
_FIEMAP_EXTENT_UNPLACED = 0x2 | 0x4 | 0x200  # UNKNOWN, DELALLOC, DATA_INLINE
_FIEMAP_EXTENT_SHARED = 0x2000
_FIEMAP_HEADER = struct.Struct("=QQIIII")
_FIEMAP_EXTENT = struct.Struct("=QQQ16xI12x")
_FIEMAP_BATCH = 512

# What the kernel says when a filesystem (or this pair of files) cannot share blocks.
_NO_REFLINK = frozenset({errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_EXT4_RESERVED_BLOCKS_MAX = 4096  # fs/ext4/super.c, ext4_set_resv_clusters
_COPY_PIECE_BYTES = 64 << 20
_COPY_CHUNK_BYTES = 1 << 20

# linux/magic.h; ext2, ext3 and ext4 share one number.
_FILESYSTEMS = {
    0x9123683E: "btrfs",
    0x58465342: "xfs",
    0xEF53: "ext4",
    0x01021994: "tmpfs",
    0x794C7630: "overlay",
    0x2FC12FC1: "zfs",
    0xCA451A4E: "bcachefs",
    0xF2F52010: "f2fs",
    0x6969: "nfs",
    0x01021997: "9p",
    0x6A656A63: "virtiofs",
    0x65735546: "fuse",
    0xFE534D42: "smb",
    0x858458F6: "ramfs",
}


def reflink(source: Path, target: Path) -> bool:
    """Make *target*, a new file that shares all blocks with *source*. Constant in the size of the file.

    Returns:
        False when the filesystem cannot; nothing is left then, nor after an error.

    Raises:
        FileExistsError: *target* exists; it is untouched.
        OSError: anything else.
    """
    with _new_copy(source, target) as (source_fd, target_fd):
        try:
            fcntl.ioctl(target_fd, _FICLONE, source_fd)
        except OSError as error:
            if error.errno not in _NO_REFLINK:
                raise
        else:
            return True
    # The context leaves the target in place unless an error passes through it, so "cannot" removes it here.
    target.unlink()
    return False


def sparse_copy(source: Path, target: Path, between: Callable[[], object] | None = None) -> int:
    """Copy *source* to the new file *target*, reading and writing only what is not a hole. Sizes are equal after it.

    Args:
        source: A file nobody writes to meanwhile.
        target: Must not exist.
        between: Called every 64 MiB; what it raises ends the copy. ``trio.from_thread.check_cancelled`` makes a copy
            in a thread cancellable.

    Returns:
        The bytes of data copied.

    Raises:
        FileExistsError: *target* exists; it is untouched.
        OSError: no *target* is left.
    """
    with _new_copy(source, target) as (source_fd, target_fd):
        size_bytes = os.fstat(source_fd).st_size
        os.ftruncate(target_fd, size_bytes)
        copied_bytes = 0
        offset = 0
        while (extent := next_data(source_fd, offset, size_bytes)) is not None:
            start, offset = extent
            for piece in range(start, offset, _COPY_PIECE_BYTES):
                if between is not None:
                    between()
                _copy_range(source_fd, target_fd, piece, min(piece + _COPY_PIECE_BYTES, offset))
            copied_bytes += offset - start
        return copied_bytes


def clone_file(source: Path, target: Path, between: Callable[[], object] | None = None) -> int:
    """Make *target* a copy of *source* the cheapest way this filesystem has. *between* is as in `sparse_copy`.

    Returns:
        The bytes copied: 0 where blocks are shared.

    Raises:
        OSError: as `sparse_copy`.
    """
    return 0 if reflink(source, target) else sparse_copy(source, target, between)


def reflink_works(directory: Path) -> bool:
    """Return whether files in *directory* can share blocks, found out by doing it with two nameless files.

    A directory that does not exist yet is judged by its nearest ancestor that does.

    Raises:
        OSError: the directory cannot be written to.
    """
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    with tempfile.TemporaryFile(dir=directory) as source, tempfile.TemporaryFile(dir=directory) as target:
        source.write(bytes(4096))
        source.flush()
        try:
            fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
        except OSError as error:
            if error.errno not in _NO_REFLINK:
                raise
            return False
        return True


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
            if error.errno not in _NO_REFLINK:
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


def fsync_tree(directory: Path) -> None:
    """Bring everything below *directory*, and the names in it, to the disk. Symbolic links are not followed."""
    for _, _, names, directory_fd in os.fwalk(directory, topdown=False, onerror=_raise):
        for name in names:
            if stat.S_ISREG(os.stat(name, dir_fd=directory_fd, follow_symlinks=False).st_mode):
                _fsync(name, directory_fd)
        os.fsync(directory_fd)


def write_out(path: Path) -> None:
    """Bring what any process wrote to the file *path* so far to the disk, so that a later sync finds little to do."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


def fsync_directory(directory: Path) -> None:
    """Bring the names in *directory* to the disk: after this, what was created or renamed there stays so."""
    _fsync(directory, None)


def publish_directory(partial: Path, final: Path) -> None:
    """Give *partial* its *final* name, once everything in it is on the disk. Either it is there complete, or not.

    Both must lie on one filesystem.

    Raises:
        OSError: *partial* still has its name (``ENOTEMPTY``: *final* exists), or, when the very last sync failed,
            *final* may not survive a power cut.
    """
    fsync_tree(partial)
    partial.rename(final)
    fsync_directory(final.parent)
    if partial.parent != final.parent:
        fsync_directory(partial.parent)


def remove_tree(path: Path) -> None:
    """Remove *path* and everything below it. What is gone already is fine; a symbolic link is removed, not followed.

    Raises:
        OSError: something could not be removed; the rest may be gone. Repeating it continues.
    """
    _remove(path, None)


def filesystem_name(path: Path) -> str:
    """Return what *path* lies on: ``btrfs``, ``xfs``, ``ext4``, ``tmpfs`` and so on, else the magic number in hex.

    Asked with ``statfs``, because a btrfs subvolume has a device number no line of ``mountinfo`` mentions.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    answer = (ctypes.c_long * 32)()  # struct statfs is 15 words on 64-bit Linux and begins with f_type
    if libc.statfs(os.fsencode(path), ctypes.byref(answer)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    magic = answer[0] & 0xFFFFFFFF
    return _FILESYSTEMS.get(magic, hex(magic))


def free_bytes(path: Path) -> int:
    """Return how many bytes an ordinary user can still write on the filesystem of *path*."""
    answer = os.statvfs(path)
    return answer.f_bavail * answer.f_frsize


def writable_bytes(path: Path) -> int:
    """Return how many bytes this process can still write on the filesystem of *path*, at least.

    Root may use the blocks that are kept back for root, but not those that ext4 keeps for itself and counts as free.
    """
    answer = os.statvfs(path)
    blocks = answer.f_bavail
    if os.geteuid() == 0:
        blocks = max(blocks, answer.f_bfree - _EXT4_RESERVED_BLOCKS_MAX)
    return blocks * answer.f_frsize


@contextlib.contextmanager
def os_errors(what: str) -> Iterator[None]:
    """Turn an `OSError` inside into noid's own, chained. *what* is the step, as in ``cloning the disk``.

    Raises:
        NoSpace: the disk, or the user's share of it, is full.
        BackendError: anything else; carries the system's own words.
    """
    try:
        yield
    except OSError as error:
        named = error.filename2 or error.filename
        place = Path(os.fsdecode(named)).parent if isinstance(named, (str, bytes, os.PathLike)) else None
        if error.errno in _FULL:
            disk = f"the disk of {place}" if place else "the disk"
            raise NoSpace(f"{what} failed: {disk} is full; free space there and try again.") from error
        raise BackendError(f"{what} failed: {error}.") from error


@contextlib.contextmanager
def _new_copy(source: Path, target: Path) -> Iterator[tuple[int, int]]:
    """Open *source* and a new *target*; the target goes away when an error passes. Errors are told with its name."""
    source_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        target_fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            yield source_fd, target_fd
        except BaseException as error:
            target.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(target)  # copies are made on descriptors, which have no names
            raise
        finally:
            os.close(target_fd)
    finally:
        os.close(source_fd)


def next_data(fd: int, offset: int, size_bytes: int) -> tuple[int, int] | None:
    """Return where the next data at or after *offset* begins and ends, or None when only a hole is left.

    A filesystem that knows no holes has data everywhere.
    """
    if offset >= size_bytes:
        return None
    try:
        start = os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        if error.errno == errno.EINVAL:  # a filesystem that knows no holes
            return offset, size_bytes
        raise
    return start, min(os.lseek(fd, start, os.SEEK_HOLE), size_bytes)


def _copy_range(source_fd: int, target_fd: int, start: int, end: int) -> None:
    """Copy bytes *start* to *end*; in the kernel where it can, else through memory."""
    offset = start
    while offset < end:
        try:
            count = os.copy_file_range(source_fd, target_fd, end - offset, offset, offset)
        except OSError as error:
            if error.errno not in _NO_REFLINK:
                raise
            break
        if count == 0:  # some filesystems answer 0 instead of an error; reading decides whether the file is that short
            break
        offset += count
    while offset < end:
        data = os.pread(source_fd, min(_COPY_CHUNK_BYTES, end - offset), offset)
        if not data:
            raise OSError(errno.EIO, "the file became shorter while it was copied")
        view = memoryview(data)
        while view:
            count = os.pwrite(target_fd, view, offset)
            offset += count
            view = view[count:]


def _raise(error: OSError) -> None:
    raise error  # `os.fwalk` would skip what it cannot read


def _fsync(name: str | Path, directory_fd: int | None) -> None:
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=directory_fd)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(name: str | Path, directory_fd: int | None) -> None:
    try:
        os.unlink(name, dir_fd=directory_fd)
    except FileNotFoundError:
        return
    except IsADirectoryError:
        pass  # Linux says EISDIR before it looks at permissions
    else:
        return
    try:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory_fd)
    except FileNotFoundError:
        return
    try:
        for child in os.listdir(fd):  # noqa: PTH208  a descriptor, which pathlib has no word for
            _remove(child, fd)
    finally:
        os.close(fd)
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(name, dir_fd=directory_fd)
