"""Writes cpio archives of the ``newc`` kind, as the kernel unpacks them from an initrd. Bytes in, bytes out.

Format: ``Documentation/driver-api/early-userspace/buffer-format.rst`` in the kernel's source. The same files give the
same bytes: entries are sorted, owned by root, and dated 1970.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping

_ALIGNMENT = 4
_TRAILER = "TRAILER!!!"


def archive(files: Mapping[str, bytes]) -> bytes:
    """Return an archive of *files*, by path without leading ``/``, with the directories they need.

    Files named ``init`` are executable (0755), all others 0644.

    Raises:
        ValueError: a path is absolute, empty, leaves the archive, or is both a file and a directory.
    """
    directories: set[str] = set()
    for path in files:
        parts = path.split("/")
        if not all(parts) or "." in parts or ".." in parts or "\0" in path:
            raise ValueError(f"{path!r} cannot be a path inside an initrd")
        directories.update("/".join(parts[:count]) for count in range(1, len(parts)))
    for path in directories & files.keys():
        raise ValueError(f"{path!r} cannot be a file and a directory")
    pieces: list[bytes] = []
    for inode, path in enumerate(sorted(directories | files.keys()), start=1):
        if path in directories:
            pieces.append(_entry(path, inode, stat.S_IFDIR | 0o755, b""))
        else:
            mode = 0o755 if path.rpartition("/")[2] == "init" else 0o644
            pieces.append(_entry(path, inode, stat.S_IFREG | mode, files[path]))
    pieces.append(_entry(_TRAILER, 0, 0, b""))
    return b"".join(pieces)


def padded(data: bytes) -> bytes:
    """Return *data* with zeros after it, so that another archive may follow: the kernel looks for one every 4 bytes."""
    return data + bytes(-len(data) % _ALIGNMENT)


def _entry(path: str, inode: int, mode: int, content: bytes) -> bytes:
    name = path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    # inode, mode, uid, gid, links, mtime, size, device (2), special device (2), name length, checksum (unused)
    fields = (inode, mode, 0, 0, links, 0, len(content), 0, 0, 0, 0, len(name), 0)
    header = b"070701" + b"".join(b"%08x" % field for field in fields)
    return padded(header + name) + padded(content)
