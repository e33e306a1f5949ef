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
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from noid.errors import BackendError, NoSpace

_FICLONE = 0x40049409  # _IOW(0x94, 9, int), linux/fs.h
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
    there = _nearest(directory)
    with tempfile.TemporaryFile(dir=there) as source, tempfile.TemporaryFile(dir=there) as target:
        source.write(bytes(4096))
        source.flush()
        try:
            fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
        except OSError as error:
            if error.errno not in _NO_REFLINK:
                raise
            return False
        return True


def hard_links_work(directory: Path) -> bool:
    """Return whether a file in *directory* can have two names, found out by doing it; otherwise as `reflink_works`."""
    with tempfile.TemporaryDirectory(prefix=".noid-probe-", dir=_nearest(directory)) as place:
        Path(place, "one").touch()
        try:
            Path(place, "two").hardlink_to(Path(place, "one"))
        except OSError:
            return False
        return True


def _nearest(directory: Path) -> Path:
    return next((place for place in (directory, *directory.parents) if place.exists()), directory)


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
