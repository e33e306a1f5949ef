"""Going back: memory and disk as they were, or everything as it is."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

House = StoryVmm = Any  # see conftest.py
pytestmark = pytest.mark.vm

WORD = "cat /dev/shm/word /root/word"


def write(noid: House, vm: str, word: str) -> None:
    """Put *word* into the guest's memory and onto its disk."""
    noid.guest(vm, f"echo {word} > /dev/shm/word; echo {word} > /root/word; sync")


def test_a_restore_in_place_brings_back_memory_and_disk(noid: House) -> None:
    noid.create("web")
    write(noid, "web", "then")
    checkpoint = noid.checkpoint("web")
    machine_id = noid.guest("web", "cat /etc/machine-id")
    write(noid, "web", "now")
    for _ in range(2):  # a checkpoint is not used up
        assert noid.ok("restore", "web", checkpoint) == f"VM 'web' restored from checkpoint '{checkpoint}'"
        assert noid.guest("web", WORD) == "then\nthen"
        write(noid, "web", "later")
    assert noid.guest("web", "cat /etc/machine-id; hostname").split() == [machine_id, "web"]  # it is the same VM
    assert len(noid.machines()) == 1
    assert noid.strays() == []


def test_a_restore_whose_machine_cannot_load_leaves_the_old_one_running(house: House, vmm: StoryVmm) -> None:
    house.create("web")
    write(house, "web", "then")
    checkpoint = house.checkpoint("web")
    write(house, "web", "now")
    state = house.checkpoint_directory(checkpoint) / "state"
    facts = state.stat()
    with state.open("r+b") as file:  # behind the seal's back, so that only the VMM can notice
        file.write(b"\0" * 4096)
    os.utime(state, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    before = house.machines()

    said = house("restore", "web", checkpoint).complaint

    assert "VM 'web'" in said or vmm.shown in said
    assert house.machines() == before
    assert house.guest("web", WORD) == "now\nnow"
    assert house.strays() == []


@pytest.mark.usefixtures("qemu")
def test_a_restore_whose_new_qemu_is_killed_leaves_the_old_one_running(house: House) -> None:
    real = shutil.which("qemu-system-x86_64")
    assert real is not None
    tools = house.cwd / "tools"
    tools.mkdir()
    wrapper = tools / "qemu-system-x86_64"
    wrapper.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    wrapper.chmod(0o755)
    house.env["PATH"] = f"{tools}:{os.environ['PATH']}"
    house.create("web")
    write(house, "web", "then")
    checkpoint = house.checkpoint("web")
    write(house, "web", "now")
    before = house.machines()
    # From now on a QEMU stops itself as it begins, and the test kills it while the restore waits for it.
    wrapper.write_text(f'#!/bin/sh\ncase "$*" in *-incoming*) kill -STOP $$;; esac\nexec {real} "$@"\n')
    restoring = house.start("restore", "web", checkpoint, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    house.eventually(lambda: stopped(house.machines().keys() - before.keys(), house))
    (new,) = house.machines().keys() - before.keys()
    os.kill(house.machines()[new], signal.SIGKILL)
    out, err = restoring.communicate(timeout=60)

    assert (restoring.returncode, out) == (1, b"")
    assert err.startswith(b"Error: ")
    assert house.machines() == before
    assert house.guest("web", WORD) == "now\nnow"
    assert house.strays() == []
    wrapper.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    house.ok("restore", "web", checkpoint)
    assert house.guest("web", WORD) == "then\nthen"


def stopped(instances: set[str], house: House) -> bool:
    """Return whether the one new machine has stopped itself."""
    if len(instances) != 1:
        return False
    (instance,) = instances
    stat = Path(f"/proc/{house.machines()[instance]}/stat").read_text()
    return stat.rpartition(")")[2].split()[0] == "T"


def test_a_checkpoint_of_another_vm_does_not_silently_replace_this_one(noid: House) -> None:
    noid.create("web")
    noid.create("db")
    checkpoint = noid.checkpoint("db")
    said = noid("restore", "web", checkpoint).complaint
    assert said.startswith(f"server error (409): checkpoint {checkpoint} is of VM 'db', not of 'web'.")
    assert f"`noid restore db {checkpoint} --as NAME`" in said
    assert noid.guest("web", "hostname") == "web"
