"""Makes the file systems that guests write to: ext4, empty, and sparse but for what mke2fs cannot leave out.

Only what every kernel since 4.0 can mount is switched on, because what this host's mke2fs would choose may be too new
for an imported image. Inode tables are not written: a new file reads as zeros, and the guest's init mounts with
``noinit_itable``, so that nothing is written to it by the guest either. The journal is small, because all of it is
written sooner or later, and then copied with each checkpoint and clone.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

from noid.errors import BackendError, DependencyDown, NoSpace

MKE2FS = "mke2fs"
SIZE_BYTES_MIN = 16 << 20

_FEATURES = (
    "none,has_journal,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,"
    "extra_isize,metadata_csum"
)
_JOURNAL_MIB_SMALL, _JOURNAL_MIB = 4, 16
_SMALL_BYTES = 256 << 20


def mke2fs_path() -> str | None:
    """Return where the program is. Debian has it where an ordinary user's PATH does not lead."""
    return shutil.which(MKE2FS, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


def make_empty_disk(path: Path, size_bytes: int) -> None:
    """Make the new file *path*, an empty ext4 of *size_bytes*, at least `SIZE_BYTES_MIN`. Blocks for 50 ms.

    Raises:
        DependencyDown: there is no mke2fs.
        NoSpace: the host's disk is full; there may be a part of *path*.
        BackendError: mke2fs failed, in its own words.
    """
    program = mke2fs_path()
    if program is None:
        raise DependencyDown(f"the program {MKE2FS} is missing. Install the package e2fsprogs and try again.")
    size_bytes = max(size_bytes, SIZE_BYTES_MIN)
    journal_mib = _JOURNAL_MIB if size_bytes >= _SMALL_BYTES else _JOURNAL_MIB_SMALL
    argv = [program, "-q", "-F", "-t", "ext4", "-O", _FEATURES, "-m", "0", "-b", "4096", "-L", "noid-layer"]
    argv += ["-J", f"size={journal_mib}", "-E", "lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0"]
    argv += [str(path), f"{size_bytes // 1024}k"]
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.close(fd)
    done = subprocess.run(
        argv, env={**os.environ, "LC_ALL": "C"}, stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    if done.returncode == 0:
        return
    words = done.stderr.decode(errors="replace").strip()
    if os.strerror(errno.ENOSPC) in words or os.strerror(errno.EDQUOT) in words:
        raise NoSpace(f"making the disk {path} failed: the disk of {path.parent} is full; free space and try again.")
    raise BackendError(f"making the disk {path} failed: {MKE2FS} ended with status {done.returncode}: {words}")
