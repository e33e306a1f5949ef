"""Stopping, starting and rebooting real VMs, by command or by themselves, and guests that do not answer."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

House = Any  # see conftest.py
pytestmark = pytest.mark.vm
HOOKS = "/etc/noid/restore.d"


def test_a_stopped_vm_starts_on_its_disk_also_with_what_was_never_synced(noid: House) -> None:
    noid.create("web")
    before = noid.guest("web", "echo kept > /root/word; echo $(hostname; cat /etc/machine-id)")
    hook = "echo $NOID_REASON >> /root/reasons"
    noid.guest("web", f"mkdir -p {HOOKS}; printf '#!/bin/sh\\n{hook}\\n' > {HOOKS}/10-why; chmod 755 {HOOKS}/10-why")
    assert noid.ok("stop", "web") == "VM 'web' is stopped (clean)"
    assert noid.machines() == {}
    assert "Ended:   stopped: clean" in noid.ok("info", "web")
    assert noid.ok("stop", "web") == "VM 'web' is stopped (already stopped)"
    said = noid("exec", "web", "--", "true").complaint
    assert said.startswith("cannot exec VM 'web': it is stopped. Start it with `noid start web`")
    assert noid.ok("start", "web") == "VM 'web' is running"
    assert noid.guest("web", "cat /root/word") == "kept"
    assert noid.guest("web", "echo $(hostname; cat /etc/machine-id)") == before
    noid.guest("web", "echo memory > /dev/shm/word")
    noid.ok("restore", "web", noid.checkpoint("web"), "--as", "copy")  # its memory has no template behind it
    assert noid.guest("copy", "echo $(cat /root/word /dev/shm/word; hostname)") == "kept memory copy"
    assert noid.guest("copy", "echo $(cat /root/reasons)") == "boot clone"
    assert noid.strays() == []


def test_a_clone_reboots_itself_and_by_command_and_stays_who_it_is(noid: House) -> None:
    noid.create("web")
    noid.guest("web", "echo kept > /root/word")
    noid.ok("restore", "web", noid.checkpoint("web"), "--as", "copy")
    who = noid.guest("copy", "echo $(hostname; cat /etc/machine-id)")
    assert who.startswith("copy ")
    noid.guest("copy", "echo changed > /root/word; sync; touch /dev/shm/before")
    old = noid.machines()[noid.instance("copy")]
    assert noid("exec", "copy", "--", "reboot").code in (0, 125)
    noid.eventually(lambda: noid.machines().get(noid.instance("copy")) not in (None, old))
    noid.eventually(lambda: noid("info", "copy", "--json").json["busy"] is None)
    assert noid.guest("copy", "echo $(cat /root/word; ls /dev/shm)") == "changed"
    assert noid.guest("copy", "echo $(hostname; cat /etc/machine-id)") == who
    assert noid.ok("reboot", "copy") == "VM 'copy' rebooted (clean)"
    assert noid.guest("copy", "echo $(hostname; cat /etc/machine-id)") == who
    assert noid.guest("web", "cat /root/word") == "kept"
    assert noid.strays() == []


def test_a_hung_machine_is_seen_harms_nobody_and_is_killed_when_its_time_is_over(noid: House) -> None:
    noid.create("web")
    noid.create("other")
    machine = noid.machines()[noid.instance("web")]
    os.kill(machine, signal.SIGSTOP)  # no vCPU runs, no QMP answers
    try:
        noid.eventually(lambda: noid("info", "web", "--json").json["responding"] is False)
        assert "running (silent)" in noid.ok("list")
        assert "Silent:  its guest has not answered since 20" in noid.ok("info", "web")
        began = time.monotonic()
        said = noid("exec", "web", "--", "true").complaint
        assert time.monotonic() - began < 20
        assert "the guest of VM 'web' has not answered since 20" in said
        assert noid.guest("other", "echo well") == "well"
        assert noid.ok("stop", "web", "--timeout", "2") == "VM 'web' is stopped (killed after 2 s)"
    finally:
        if machine in noid.machines().values():
            os.kill(machine, signal.SIGCONT)
    assert noid.ok("start", "web", "other").splitlines() == ["VM 'web' is running", "VM 'other' is running"]
    assert noid.guest("web", "echo well") == "well"
