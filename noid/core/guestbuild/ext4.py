"""Root file systems as files: makes ext4 images from directories without mounting, and recognises them.

Layout of the superblock: ``Documentation/filesystems/ext4/super.rst`` in the kernel's source.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from noid.core.guestbuild import programs
from noid.errors import BackendError, InvalidRequest

_SUPERBLOCK_OFFSET = 1024
_SUPERBLOCK_BYTES = 1024
_MAGIC = 0xEF53
_INCOMPAT_64BIT = 0x80
_PREZEROED_SINCE = (1, 47, 0)

# What people hand in instead, by first bytes, and what to do about it.
_OTHERS = {
    b"QFI\xfb": "a qcow2 disk; take the file system out of it with 'qemu-img convert -O raw' and mount or copy it",
    b"\x1f\x8b": "gzip-compressed; unpack it first",
    b"\xfd7zX": "xz-compressed; unpack it first",
    b"\x28\xb5\x2f\xfd": "zstd-compressed; unpack it first",
    b"hsqs": "a squashfs; make an ext4 of its content with 'mke2fs -t ext4 -d DIRECTORY FILE SIZE'",
}


def check(path: Path) -> None:
    """Return if *path* is a complete ext4 file system.

    Raises:
        InvalidRequest: it is not; says what it is instead, if that can be told.
    """
    size_bytes = path.stat().st_size
    if not size_bytes:
        raise InvalidRequest(f"the root file system {path} is empty. Give an ext4 image.")
    with path.open("rb") as file:
        head = file.read(_SUPERBLOCK_OFFSET + _SUPERBLOCK_BYTES)
    superblock = head[_SUPERBLOCK_OFFSET:]
    if len(superblock) < _SUPERBLOCK_BYTES or struct.unpack_from("<H", superblock, 0x38)[0] != _MAGIC:
        looks = next((words for magic, words in _OTHERS.items() if head.startswith(magic)), None)
        if looks is None and head[510:512] == b"\x55\xaa":
            looks = "a whole disk with partitions; give the root partition alone"
        raise InvalidRequest(
            f"the root file system {path} is not ext4{f': it is {looks}' if looks else ''}. "
            "Make one with 'mke2fs -t ext4 -d DIRECTORY FILE SIZE'."
        )
    blocks, log_block_bytes = struct.unpack_from("<4xI16xI", superblock, 0)[0:2]
    if struct.unpack_from("<I", superblock, 0x60)[0] & _INCOMPAT_64BIT:
        blocks |= struct.unpack_from("<I", superblock, 0x150)[0] << 32
    needed_bytes = blocks * (1024 << log_block_bytes)
    if needed_bytes > size_bytes:
        raise InvalidRequest(
            f"the root file system {path} is cut off: it needs {needed_bytes} bytes and the file has {size_bytes}. "
            "Copy it again."
        )


def make(
    tree: Path,
    target: Path,
    size_bytes: int,
    owners: Mapping[str, tuple[int, int]] | None = None,
    capabilities: Mapping[str, bytes] | None = None,
) -> None:
    """Make *target*, a sparse ext4 file system with the content of *tree*.

    Args:
        tree: What goes in, with the owners it has unless *owners* is given.
        target: A new file.
        size_bytes: Its apparent size; what is not used takes no room on the host.
        owners: User and group ids by path without leading ``/``; everything else becomes root's. Lets an ordinary
            user make a file system that is not his own.
        capabilities: Values of ``security.capability`` by path: what a program may do whoever runs it.

    Raises:
        DependencyDown: no e2fsprogs.
        BackendError: mke2fs failed, for example because *tree* does not fit.
    """
    # A new sparse file reads as zeros, so nothing needs zeroing: neither now, nor by the guest while it boots.
    zeroed = "assume_storage_prezeroed=1" if _version() >= _PREZEROED_SINCE else "lazy_itable_init=1"
    argv = ["mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-b", "4096", "-L", "noid"]
    argv += [
        "-E",
        f"{zeroed},lazy_journal_init=1,root_owner=0:0",
        "-d",
        str(tree),
        str(target),
        f"{size_bytes // 1024}k",
    ]
    programs.run(argv, "making the file system")
    if owners is not None:
        _edit(target, _owner_commands(tree, owners), "setting owners")
    if capabilities:
        with tempfile.TemporaryDirectory(prefix="noid-capabilities-") as place:
            commands = []
            for number, (path, value) in enumerate(sorted(capabilities.items())):
                (Path(place) / str(number)).write_bytes(value)
                commands.append(f'ea_set -f {place}/{number} "/{path}" security.capability')
            _edit(target, commands, "setting capabilities")


def _version() -> tuple[int, ...]:
    # mke2fs tells its version on stderr
    program = programs.require("mke2fs", "making the file system")
    said = subprocess.run([program, "-V"], capture_output=True, env=programs.environment(), check=False).stderr
    match = re.search(rb"(\d+)\.(\d+)\.(\d+)", said)
    return tuple(int(number) for number in match.groups()) if match else ()


def _owner_commands(tree: Path, owners: Mapping[str, tuple[int, int]]) -> list[str]:
    commands: list[str] = []
    for path in sorted(tree.rglob("*")):
        inside = path.relative_to(tree).as_posix()
        facts = path.lstat()
        uid, gid = owners.get(inside, (0, 0))
        if uid != facts.st_uid:
            commands.append(f'set_inode_field "/{inside}" uid {uid}')
        if gid != facts.st_gid:
            commands.append(f'set_inode_field "/{inside}" gid {gid}')
    return commands


def _edit(target: Path, commands: list[str], purpose: str) -> None:
    """Change things inside the file system, where no privileges are needed."""
    program = programs.require("debugfs", purpose)
    script = "\n".join(commands).encode() + b"\n"
    argv = [program, "-w", "-f", "-", str(target)]
    done = subprocess.run(argv, input=script, capture_output=True, env=programs.environment(), check=False)
    # debugfs exits with 0 whatever its commands did; beside its own name it writes only complaints to stderr
    complaints = [line for line in done.stderr.splitlines() if line and not line.startswith(b"debugfs ")]
    if done.returncode != 0 or complaints:
        raise BackendError(f"{purpose} failed: {programs.failure(program, done.returncode, b'; '.join(complaints))}.")
