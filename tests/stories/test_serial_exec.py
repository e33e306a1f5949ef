"""A guest without anything of noid's in it: a shell on its serial console is enough."""

from __future__ import annotations

import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from noid.core.guestbuild import cpio

House = Any  # see conftest.py
pytestmark = pytest.mark.vm

INIT = """#!/bin/busybox sh
export PATH=/bin HOME=/root
/bin/busybox mkdir -p /proc /sys /dev /tmp /root /etc /run
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox --install -s /bin
echo root:x:0:0:root:/root:/bin/sh >/etc/passwd
echo nobody:x:65534:65534:nobody:/:/bin/sh >>/etc/passwd
while :; do setsid cttyhack sh; done
"""


def foreign_initrd(rootfs: Path, place: Path) -> Path:
    """Return an initrd with the busybox of *rootfs* and an init of its own, which never mounts a root."""
    busybox = place / "busybox"
    subprocess.run(["debugfs", "-R", f"dump /bin/busybox {busybox}", rootfs], check=True, capture_output=True)
    executable = stat.S_IFREG | 0o755
    initrd = place / "initrd"
    initrd.write_bytes(
        cpio._entry("bin", 1, stat.S_IFDIR | 0o755, b"")
        + cpio._entry("bin/busybox", 2, executable, busybox.read_bytes())
        + cpio._entry("init", 3, executable, INIT.encode())
        + cpio._entry("TRAILER!!!", 0, 0, b"")
    )
    return initrd


@pytest.fixture
def plain_house(shared_house: House, data_dir: Path, tmp_path: Path) -> Iterator[House]:
    """A house with one image, ``plain``, in which nothing is of noid's, and both ways into guests."""
    house = type(shared_house)(data_dir, tmp_path)
    house.settings('[pool]\nsize = 1\n[backends]\nexec = ["vsock", "serial"]\n')
    tiny = shared_house.layout.images / "tiny"
    files = ("--kernel", str(tiny / "kernel"), "--rootfs", str(tiny / "rootfs.ext4"))
    initrd = foreign_initrd(tiny / "rootfs.ext4", tmp_path)
    done = house.server("image", "import", "plain", *files, "--initrd", str(initrd), "--no-agent", "--ready", "true")
    assert done.code == 0, done.err
    yield house
    house.empty()


def test_a_guest_without_an_agent_is_created_frozen_and_forked_through_its_console(plain_house: House) -> None:
    house = plain_house
    house.create("web", image="plain")
    done = house(
        "exec", "web", "-e", "SECRET=s3cr3t word", "--", "sh", "-c", 'printf "%s\\377" "$SECRET"; echo e >&2; exit 7'
    )
    assert (done.code, done.out, done.err) == (7, b"s3cr3t word\xff", b"e\n")
    assert b"s3cr3t" not in (house.directory("web") / "serial.log").read_bytes()
    echoed = house("exec", "web", "-i", "--", "cat", stdin=b"\0\x03\x04\r\n" * 50)
    assert (echoed.code, len(echoed.out), echoed.out, echoed.err) == (0, 250, b"\0\x03\x04\r\n" * 50, b""), (
        (house.directory("web") / "serial.log").read_bytes().decode().replace("\n", "~").replace("\r", "")[-900:]
    )
    numbers = house("exec", "web", "--", "seq", "1", "4000")  # longer than what the host reads of the console at once
    assert numbers.out == b"".join(b"%d\n" % number for number in range(1, 4001))
    assert house.guest("web", "hostname; echo before >/tmp/file; cat /etc/machine-id").split("\n")[0] == "web"

    checkpoint = house.checkpoint("web")
    house.guest("web", "echo after >/tmp/file")
    house.ok("restore", "web", checkpoint, "--as", "copy")

    assert house.guest("copy", "cat /tmp/file; hostname") == "before\ncopy"
    assert house.guest("web", "cat /tmp/file; hostname") == "after\nweb"
    machine_ids = {house.guest(vm, "cat /etc/machine-id") for vm in ("web", "copy")}
    assert len(machine_ids) == 2
    items = {item["name"]: item["status"] for item in house("info", "copy", "--json").json["receipt"]}
    assert items["hostname"] == items["machine-id"] == items["clock"] == "done"
    assert items["randomness"] == "not_possible"  # this root has neither perl nor python3

    house.end_agent()
    assert house.guest("web", "cat /tmp/file") == "after"
