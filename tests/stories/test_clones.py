"""What a clone is: everything its checkpoint was, except whose it is."""

from __future__ import annotations

import shlex
import time
from typing import Any

import pytest

House = Any  # see conftest.py
pytestmark = pytest.mark.vm

NUMBER = "/dev/shm/number"
COUNT = (
    f"echo $$ > {NUMBER}.pid; n=0; "
    f"while :; do n=$((n+1)); echo $n > {NUMBER}.new; mv {NUMBER}.new {NUMBER}; sleep 0.05; done"
)
CLOCK_SECS = 5.0


def start_counting(noid: House, vm: str) -> None:
    """Let a process count up in the guest's memory."""
    noid.guest(vm, f"setsid sh -c {shlex.quote(COUNT)} >/dev/null 2>&1 </dev/null & until [ -s {NUMBER} ]; do :; done")


def number(noid: House, vm: str) -> int:
    """Return what it has reached."""
    return int(noid.guest(vm, f"cat {NUMBER}"))


def test_a_clone_wakes_where_its_checkpoint_was_taken(noid: House) -> None:
    noid.create("web")
    start_counting(noid, "web")
    noid.guest("web", "echo before > /root/note")
    at_least = number(noid, "web")
    checkpoint = noid.checkpoint("web")
    noid.guest("web", f"echo after > /root/note; echo 0 > {NUMBER}; kill $(cat {NUMBER}.pid)")

    noid.ok("restore", "web", checkpoint, "--as", "copy")

    first = number(noid, "copy")
    assert first >= at_least
    noid.eventually(lambda: number(noid, "copy") > first)
    assert noid.guest("copy", "cat /root/note") == "before"
    assert noid.guest("web", "cat /root/note") == "after"


def test_a_clone_has_its_own_clock_randomness_names_and_a_receipt_of_it(noid: House) -> None:
    noid.create("web")
    noid.guest("web", "date -s 2001-01-01 >/dev/null")
    checkpoint = noid.checkpoint("web")
    for name in ("left", "right"):
        noid.ok("restore", "web", checkpoint, "--as", name)

    three = ("web", "left", "right")
    assert [noid.guest(vm, "hostname; cat /etc/hostname") for vm in three] == [f"{vm}\n{vm}" for vm in three]
    for secret in ("cat /etc/machine-id", "cat /proc/sys/kernel/random/boot_id", "head -c 16 /dev/urandom | od -x"):
        assert len({noid.guest(vm, secret) for vm in three}) == 3, secret
    for vm in ("left", "right"):
        asked = time.time()
        assert asked - CLOCK_SECS < int(noid.guest(vm, "date +%s")) < time.time() + CLOCK_SECS
        receipt = {item["name"]: item for item in noid("info", vm, "--json").json["receipt"]}
        assert {"clock", "randomness", "hostname", "machine-id"} <= receipt.keys()
        assert {item["status"] for item in receipt.values() if item["required"]} == {"done"}
        assert (receipt["hostname"]["before"], receipt["hostname"]["after"]) == ("web", vm)


def test_children_of_children_of_clones_remember_every_generation(noid: House) -> None:
    noid.create("g0")
    start_counting(noid, "g0")
    reached = 0
    for generation in range(4):
        vm, child = f"g{generation}", f"g{generation + 1}"
        noid.guest(vm, f"echo {generation} > /dev/shm/memory{generation}; echo {generation} > /root/disk{generation}")
        reached = number(noid, vm)
        checkpoint = noid.checkpoint(vm)
        if generation == 2:
            noid.ok("destroy", vm)  # a child needs nobody above it
        noid.ok("restore", vm, checkpoint, "--as", child)
        assert number(noid, child) >= reached
    seen = noid.guest("g4", "cat /dev/shm/memory* /root/disk*")
    assert seen.split() == ["0", "1", "2", "3", "0", "1", "2", "3"]
    assert noid.guest("g1", "cat /dev/shm/memory* /root/disk*").split() == [
        "0",
        "1",
        "0",
        "1",
    ]  # its own, and nothing else


def test_a_clone_copies_neither_memory_nor_disk(noid: House) -> None:
    noid.create("web")
    checkpoint = noid.checkpoint("web")
    frozen = noid.checkpoint_directory(checkpoint)
    noid.ok("restore", "web", checkpoint, "--as", "copy")
    place = noid.directory("copy")
    assert (place / "memory").samefile(frozen / "memory")
    own = [f for f in place.iterdir() if f.is_file() and f.stat().st_nlink == 1]
    assert sum(f.stat().st_blocks * 512 for f in own) < 1 << 20, own


def test_checkpoints_outlive_their_vm_and_bring_it_back(noid: House) -> None:
    noid.create("gone")
    noid.guest("gone", "echo precious > /dev/shm/word; echo precious > /root/word")
    checkpoint = noid.checkpoint("gone")
    noid.ok("destroy", "gone")
    assert "gone" not in noid.states()
    assert [c["id"] for c in noid("checkpoints", "gone", "--json").json] == [checkpoint]
    noid.ok("restore", "gone", checkpoint)
    assert noid.guest("gone", "cat /dev/shm/word /root/word") == "precious\nprecious"
