"""VMs that power off, die, or never answer: what people read then, and the way out."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

House = Any  # see conftest.py
pytestmark = pytest.mark.vm


def test_a_vm_that_powers_itself_off_is_stopped_and_can_be_restored(noid: House) -> None:
    noid.create("web")
    noid.guest("web", "echo kept > /root/word")
    checkpoint = noid.checkpoint("web")
    done = noid("exec", "web", "--", "poweroff", "-f")
    assert done.code in (0, 125)
    noid.eventually(lambda: noid.states()["web"] == "stopped")
    told = "Start it with `noid start web`, restore it from a checkpoint, or destroy it."
    assert noid("exec", "web", "--", "true").complaint == f"cannot exec VM 'web': it is stopped. {told}"
    said = noid("checkpoint", "web").complaint
    assert said == f"server error (409): cannot checkpoint VM 'web': it is stopped. {told}"
    noid.ok("restore", "web", checkpoint)
    assert noid.guest("web", "cat /root/word") == "kept"
    assert noid.strays() == []


def test_a_vm_whose_qemu_was_killed_is_dead_and_a_restore_revives_it(noid: House) -> None:
    noid.create("web")
    noid.guest("web", "echo kept > /dev/shm/word")
    checkpoint = noid.checkpoint("web")
    noid.kill_machine("web")
    noid.eventually(lambda: noid.states()["web"] == "dead")
    told = "Its machine has ended: boot its disk with `noid start web`, restore it from a checkpoint, or destroy it."
    assert noid("exec", "web", "--", "true").complaint == f"cannot exec VM 'web': it is dead. {told}"
    noid.ok("restore", "web", checkpoint)
    assert noid.states() == {"web": "running"}
    assert noid.guest("web", "cat /dev/shm/word") == "kept"
    assert noid.strays() == []


def test_a_command_whose_machine_is_killed_is_125(noid: House) -> None:
    noid.create("web")
    with noid.start(
        "exec", "web", "--", "sh", "-c", "echo begun; exec sleep 7305", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        assert running.stdout.readline() == b"begun\n"
        noid.kill_machine("web")
        assert running.wait(60) == 125
        said = running.stderr.read().decode()
    assert said.startswith("Error: ")
    assert said.count("\n") == 1


def test_a_guest_that_is_never_ready_is_given_up_with_its_console(house: House) -> None:
    again(house, "sleepy", "--ready", "sleep 1000")
    house.settings("boot_timeout_secs = 6\n[pool]\nsize = 0\n")
    house.end_agent()
    said = house("create", "x", "--mem", "96", "--image", "sleepy").complaint
    assert said.startswith(
        "server error (504): image 'sleepy' did not finish booting within 6 s. Its console said last: "
    )
    assert "raise boot_timeout_secs in server.toml" in said
    assert house.states() == {}
    assert house.machines() == {}
    assert house.strays() == []


def test_a_root_that_cannot_be_mounted_and_an_init_that_ends_are_said(house: House) -> None:
    again(house, "rootless", "--cmdline", "rootfstype=no-such-fs")
    rootfs = house.cwd / "init.ext4"
    shutil.copyfile(house.layout.images / "tiny" / "rootfs.ext4", rootfs)
    init = house.cwd / "init"
    init.write_text("#!/bin/sh\nexit 3\n")
    init.chmod(0o755)
    script = f"mkdir /sbin\nwrite {init} /sbin/init\nset_inode_field /sbin/init mode 0100755\n"
    subprocess.run(["debugfs", "-w", "-f", "-", str(rootfs)], input=script.encode(), capture_output=True, check=True)
    again(house, "initless", rootfs=rootfs)
    said = house("create", "x", "--mem", "96", "--image", "rootless").complaint
    assert said.startswith("server error (500): The guest started but has no root file system: cannot mount /dev/vd")
    said = house("create", "x", "--mem", "96", "--image", "initless").complaint
    assert said.startswith("server error (503): the VM ended before its guest answered")
    assert "Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000300" in said
    assert house.states() == {}
    assert house.machines() == {}
    assert house.strays() == []


def again(house: House, name: str, *options: str, rootfs: Path | None = None) -> None:
    """Import the tiny image once more, with something about it that is wrong."""
    tiny = house.layout.images / "tiny"
    words = ["--kernel", str(tiny / "kernel"), "--rootfs", str(rootfs or tiny / "rootfs.ext4")]
    done = house.server("image", "import", name, *words, "--initrd", str(tiny / "initrd.base"), *options)
    assert done.code == 0, done.err.decode()
