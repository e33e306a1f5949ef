"""Makes the tiny guest: busybox and a handful of files, for tests and for whoever wants a VM in two seconds.

It has no init of its own: the guest agent from the initrd is its PID 1.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from noid.core.guestbuild import cache, debs, ext4, programs
from noid.core.guestbuild.stages import Stage, silent
from noid.errors import BackendError

TINY_SIZE_BYTES = 64 << 20
_RECIPE = 2  # raise it when the same package must give another file system

_DIRECTORIES = ("dev", "etc", "home/noid", "mnt", "proc", "root", "run", "sys", "tmp", "usr/lib", "var/log", "var/tmp")
_STICKY = ("tmp", "var/tmp")
_OWNERS = {"home/noid": (1000, 1000)}
_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnoid:x:1000:1000:noid:/home/noid:/bin/sh\n"
    "nobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\nnoid:x:1000:\nnogroup:x:65534:\n",
    "etc/shells": "/bin/sh\n",
    "etc/hostname": "noid\n",
    "etc/hosts": "127.0.0.1 localhost\n127.0.1.1 noid\n",
    "etc/resolv.conf": "nameserver 10.0.2.3\n",  # QEMU's user-mode network answers there
    "etc/machine-id": "",
    "etc/profile": "export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n",
}
# The agent is PID 1 here, and an init that is found would be started in its place.
_NOT_APPLETS = ("init", "linuxrc")


def tiny_rootfs(stage: Stage = silent) -> Path:
    """Return the tiny root file system, ext4, 64 MiB, 3 MB of them used; from the cache or made in a second.

    Raises:
        DependencyDown: no apt, no network, no e2fsprogs; says what to do.
        NoSpace: the disk of the cache is full.
    """
    package = debs.candidate("busybox-static")

    def build(place: Path) -> None:
        with stage(f"making the tiny root file system from {package.name} {package.version}"):
            busybox = debs.files(package, lambda path: path in ("bin/busybox", "usr/bin/busybox"))
            if not busybox:
                raise BackendError(f"package {package.name} {package.version} holds no busybox.")
            with tempfile.TemporaryDirectory(prefix="noid-tiny-") as tree:
                _furnish(Path(tree), next(iter(busybox.values())))
                ext4.make(Path(tree), place / "rootfs.ext4", TINY_SIZE_BYTES, _OWNERS)

    place = cache.cached("tiny", f"{package.version.replace(':', '.')}_{package.architecture}_{_RECIPE}", build)
    return place / "rootfs.ext4"


def _furnish(tree: Path, busybox: bytes) -> None:
    tree.chmod(0o755)  # newer versions of mke2fs give the root directory the mode found here
    for name in _DIRECTORIES:
        (tree / name).mkdir(parents=True, exist_ok=True)
    for name in _STICKY:
        (tree / name).chmod(0o1777)
    (tree / "root").chmod(0o700)
    for name, text in _FILES.items():
        (tree / name).write_text(text)
    program = tree / "bin" / "busybox"
    program.parent.mkdir()
    program.write_bytes(busybox)
    program.chmod(0o755)
    for applet in programs.run([str(program), "--list-full"], "asking busybox what it can do").decode().split():
        path = tree / applet
        if path.name not in _NOT_APPLETS and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(program, path)
