"""A VM whose disk is an image below and what it wrote above: full, frozen, cloned, rebooted. Images that cannot."""

from __future__ import annotations

from typing import Any

import pytest

House = Any  # see conftest.py
pytestmark = pytest.mark.vm
SETTINGS = '[pool]\nsize = 0\n[backends]\nstorage = "layers"\n'


def test_a_disk_in_layers_is_full_frozen_cloned_and_rebooted_as_any(house: House) -> None:
    house.settings(SETTINGS)
    house.create("web")
    assert house.guest("web", "stat -c '%a %u %h' / /bin/busybox | head -1").startswith("755 0")
    house.guest("web", "echo changed >> /etc/hosts; mv /usr /usr2; mv /usr2 /usr; echo kept > /root/word; sync")
    assert "No space left" in house.guest("web", "cat /dev/zero 2>&1 > /root/fill | tail -1; rm /root/fill; sync")
    checkpoint = house.checkpoint("web")
    house.guest("web", "echo later > /root/word; sync")
    house.ok("restore", "web", checkpoint, "--as", "copy")
    assert house.guest("copy", "cat /root/word; tail -1 /etc/hosts; df / | tail -1").startswith(
        "kept\nchanged\noverlay"
    )
    base = house.directory("copy") / "base.raw"
    assert base.samefile(house.layout.images / "tiny" / "rootfs.ext4")
    house.ok("reboot", "web")
    assert house.guest("web", "cat /root/word; tail -1 /etc/hosts") == "later\nchanged"
    assert house.strays() == []


def test_an_image_that_cannot_put_layers_together_says_so(house: House) -> None:
    house.settings(SETTINGS)
    tiny = house.layout.images / "tiny"
    kernel, rootfs, modules = str(tiny / "kernel"), str(tiny / "rootfs.ext4"), house.data_dir / "modules"
    files = ["--kernel", kernel, "--rootfs", rootfs]
    assert house.server("image", "import", "bare", *files, "--no-agent").code == 0
    said = house("create", "web", "--image", "bare").complaint
    assert "imported with --no-agent" in said
    assert 'storage = "copy"' in said
    modules.mkdir()
    _unpack_modules((tiny / "initrd.base").read_bytes(), modules)
    (modules / "overlay.ko").unlink()
    done = house.server("image", "import", "old", *files, "--modules", str(modules))
    assert done.code == 0, done.err
    said = house("create", "web", "--mem", "96", "--image", "old").complaint
    assert "this image has no overlayfs, which a disk in layers needs" in said
    assert house.states() == {}


def _unpack_modules(archive: bytes, into: Any) -> None:
    """Write the modules of an initrd into a directory, under their own names."""
    at = 0
    while archive[at : at + 6] == b"070701":
        size, name_size = (int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in (6, 11))
        name = archive[at + 110 : at + 110 + name_size - 1].decode()
        start = (at + 110 + name_size + 3) & ~3
        if name.endswith(".ko"):
            (into / name.rpartition("/")[2].partition("-")[2]).write_bytes(archive[start : start + size])
        at = (start + size + 3) & ~3
