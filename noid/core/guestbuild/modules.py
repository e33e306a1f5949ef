"""Chooses the kernel modules an initrd needs so that the guest finds its disk, its agent channel and its network card.

Dependencies are read from the modules themselves (their ``.modinfo`` section), because packages ship no
``modules.dep``: depmod writes that when a kernel is installed, and here none is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from noid.core.guestbuild.vmlinux import decompressed

# In the order they are loaded. A kernel that has one built in, or not at all, goes without.
WANTED = (
    "virtio_mmio",
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "crc32c_generic",  # ext4 asks for "crc32c" by name, which no dependency records
    "ext4",
    "overlay",  # puts disks in layers together
    "virtio_rng",
    "virtio_net",
    "vmw_vsock_virtio_transport",
    "virtio_balloon",
    "button",
    "evdev",
)
_FILE = re.compile(r"(?:.*/)?([^/]+)\.ko(?:\.(?:xz|gz|zst))?$")
_DEPENDS = re.compile(rb"(?:\A|\0)depends=([^\0]*)\0")
_VERMAGIC = re.compile(rb"(?:\A|\0)vermagic=([^\0 ]*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """A module ready to load. *release* is the kernel it was built for."""

    name: str
    release: str
    content: bytes = field(repr=False)


def module_name(path: str) -> str | None:
    """Return the module in file *path* as the kernel calls it, or None when it is no module."""
    match = _FILE.match(path)
    return match[1].replace("-", "_") if match else None


def boot_modules(paths: Iterable[str], read: Callable[[str], bytes]) -> list[Module]:
    """Return the `WANTED` modules among *paths* with what they depend on, in an order they can be loaded in."""
    files = {name: path for path in sorted(paths) if (name := module_name(path))}
    chosen: dict[str, Module] = {}
    walking: set[str] = set()

    def add(name: str) -> None:
        if name in chosen or name in walking or name not in files:
            return
        walking.add(name)
        content = decompressed(read(files[name]))
        depends = _DEPENDS.search(content)
        for dependency in (depends[1].decode() if depends else "").split(","):
            add(dependency.replace("-", "_"))
        vermagic = _VERMAGIC.search(content)
        chosen[name] = Module(name=name, release=vermagic[1].decode() if vermagic else "", content=content)

    for name in WANTED:
        add(name)
    return list(chosen.values())


def initrd_files(modules: Iterable[Module]) -> dict[str, bytes]:
    """Return *modules* under the paths the guest's init loads them from, in name order: ``noid/modules/NN-name.ko``."""
    return {f"noid/modules/{number:02}-{m.name}.ko": m.content for number, m in enumerate(modules)}
