"""Guests for tests: one that boots in two seconds, and files that pass for a kernel until somebody boots them."""

from __future__ import annotations

import os
import platform
import struct
from pathlib import Path

from noid.core.guestbuild import distribution_kernel, tiny_rootfs
from noid.core.images import Images
from noid.core.model.images import Image
from noid.errors import NotFound

TINY = "tiny"
TINY_VARIABLE = "NOID_TINY_IMAGE"
FAKE_RELEASE = "6.12.0-test"
_ELF_MACHINES = {"x86_64": 62, "aarch64": 183}


def tiny_image(images: Images) -> Image:
    """Return the image `TINY` of *images*, added if it is not there: the distribution's kernel and busybox. Blocks.

    Its users are ``root`` (the default) and ``noid``; the guest agent is its PID 1. Where ``NOID_TINY_IMAGE`` names a
    directory, its ``vmlinux``, ``modules`` and ``rootfs.ext4`` are taken, for machines without package lists.

    Raises:
        DependencyDown: no apt, no network, a missing program; names it, so that a test can skip with these words.
    """
    try:
        return images.get(TINY)
    except NotFound:
        kernel, modules, rootfs = _parts()
        return images.add(
            TINY,
            kernel=kernel,
            modules=modules,
            rootfs=rootfs,
            ready=("true",),
            description="busybox, for tests",
        )


def _parts() -> tuple[Path, Path, Path]:
    """Return kernel, modules and root file system of the tiny image."""
    if given := os.environ.get(TINY_VARIABLE):
        place = Path(given)
        return place / "vmlinux", place / "modules", place / "rootfs.ext4"
    kernel = distribution_kernel()
    return kernel.vmlinux, kernel.modules, tiny_rootfs()


def fake_kernel(release: str = FAKE_RELEASE, architecture: str | None = None, filling: bytes = b"") -> bytes:
    """Return an ELF file that says it is Linux of *release*, for the host's architecture unless told otherwise."""
    machine = _ELF_MACHINES[architecture or platform.machine()]
    header = (b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 2, machine)).ljust(64, b"\0")
    return header + f"Linux version {release} (somebody)\0".encode() + filling


def fake_module(depends: str = "", release: str = FAKE_RELEASE) -> bytes:
    """Return a file with the ``.modinfo`` strings of a kernel module. *depends* separates names by commas."""
    return b"\x7fELF\0license=GPL\0" + f"depends={depends}\0vermagic={release} SMP mod_unload \0".encode()
