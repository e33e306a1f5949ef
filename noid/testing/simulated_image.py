"""Images for simulated VMs: a kernel, an initrd and a root disk that pass every check and hold nothing."""

from __future__ import annotations

import hashlib
import platform
import struct
from pathlib import Path

from noid.core.images import Images
from noid.core.model.images import Image
from noid.core.model.times import now

_MACHINES = {"x86_64": 62, "aarch64": 183}
_ROOT_BYTES = 1 << 20


def simulated_files(directory: Path) -> tuple[Path, Path, Path]:
    """Write a kernel, an initrd and an empty ext4 of 1 MiB into *directory* and return their paths."""
    kernel, initrd, rootfs = (directory / name for name in ("kernel", "initrd", "rootfs.ext4"))
    header = struct.pack("<4s2B10xHH44x", b"\x7fELF", 2, 1, 2, _MACHINES[platform.machine()])
    kernel.write_bytes(header + b"\0Linux version 6.0-simulated (noid) \0")
    initrd.write_bytes(b"")
    superblock = bytearray(1024)
    struct.pack_into("<4xI16xI", superblock, 0, _ROOT_BYTES // 4096, 2)
    struct.pack_into("<H", superblock, 0x38, 0xEF53)
    rootfs.write_bytes(bytes(1024) + superblock + bytes(_ROOT_BYTES - 2048))
    return kernel, initrd, rootfs


def simulated_image(directory: Path, *, cmdline: str = "") -> Image:
    """Return an image of files written into *directory*, registered nowhere."""
    kernel, initrd, rootfs = simulated_files(directory)
    return Image(
        name="simulated",
        directory=directory,
        kernel=kernel,
        initrd=initrd,
        rootfs=rootfs,
        digest=hashlib.sha256(cmdline.encode()).hexdigest(),
        cmdline=cmdline,
        created_at=now(),
    )


def add_simulated_image(images: Images, scratch: Path, name: str = "default", *, cmdline: str = "") -> Image:
    """Add an image for simulated VMs to a registry; *scratch* is an existing directory for its files. Blocks.

    Kernel arguments as in `noid.testing.simulated_machine`: ``simulated.mute``, ``simulated.boot_secs=N``.
    """
    kernel, _, rootfs = simulated_files(scratch)
    return images.add(name, kernel=kernel, rootfs=rootfs, cmdline=cmdline, ready=("true",), description="simulated")
