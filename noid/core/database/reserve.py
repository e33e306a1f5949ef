"""Room on the disk that only the database can use, so that what was begun can be undone on a full one.

To free space is to write first: that a VM is being destroyed, that a create has failed. So SQLite's write-ahead log is
given its blocks beforehand. SQLite begins that file anew once its content is in the database, never shortens it while
somebody has it open, and takes what lies behind the last commit for nothing; so the blocks stay its own, and neither a
guest nor another program can take them, as they could take those of a ballast file that is removed when it is needed.

What asks for more room is refused before only the reserve is left (`Reserve.require_room`); what undoes, ends or
removes something may use it. A file system that never writes in place (btrfs, ZFS) gives no such promise: there an
undo that finds no room is repeated until it does.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from pathlib import Path

from noid import hostfs
from noid.errors import NoSpace

logger = logging.getLogger(__name__)

#: SQLite begins its log anew every 4 MiB, if what is in it finds room in the database. The rest is for when it does
#: not. All of it, 3817 pages, fits the first 32 KiB of the log's index (4062 pages): that needs no block either.
LOG_BYTES = 15 << 20
#: What an operation that needs room must find: as much as the log can add to the database at once.
ROOM_BYTES = 4 << 20

_CANNOT = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EOPNOTSUPP, errno.ENOSYS})


class Reserve:
    """The reserve of one database. Its functions block, for microseconds once it is there."""

    def __init__(self, database: Path) -> None:
        self._directory = database.parent
        self._log = database.with_name(f"{database.name}-wal")

    def take(self) -> bool:
        """Give the log its blocks, if it lacks any and there is room for more than that. Return whether it has them."""
        try:
            if self._log.stat().st_blocks * 512 >= LOG_BYTES:
                return True
            if hostfs.writable_bytes(self._directory) < LOG_BYTES + ROOM_BYTES:
                return False
            allocate(self._log, LOG_BYTES)
        except FileNotFoundError:  # nobody has written to the database since it was opened
            return False
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            logger.debug("no room is reserved for the database: %s", error)
            return False
        return True

    def has_room(self) -> bool:
        """Return whether there is more room on the disk than the reserve, which is taken now if it was not there.

        Raises:
            BackendError: the disk cannot be asked.
        """
        with hostfs.os_errors("looking for room on the database's disk"):
            self.take()
            return hostfs.writable_bytes(self._directory) >= ROOM_BYTES

    def require_room(self) -> None:
        """Let pass what needs room on the disk.

        Raises:
            NoSpace: there is none but the reserve.
            BackendError: the disk cannot be asked.
        """
        if not self.has_room():
            raise NoSpace(
                f"the disk of {self._directory} is full; nothing was changed. Destroy a VM, delete a checkpoint or "
                "free space there otherwise, and try again."
            )


def allocate(path: Path, size: int) -> None:
    """Give the first *size* bytes of the file *path* their blocks on the disk. What is in it stays; it may get longer.

    Not ``posix_fallocate``, which writes into files where the filesystem cannot: others may be writing there.

    Raises:
        OSError: the disk is full, or the filesystem cannot (``EOPNOTSUPP``).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if libc.fallocate(fd, 0, 0, size) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(fd)
