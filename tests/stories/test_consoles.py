"""The serial console of a real VM: typed on, left, come back to, and never the guest's problem."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytestmark = pytest.mark.vm

PATIENCE_SECS = 60.0
DETACH = b"\x1d"


class AtTheConsole:
    """Somebody at a terminal in which ``noid console`` runs."""

    def __init__(self, noid: Any, vm: str, *options: str) -> None:
        self.terminal, theirs = pty.openpty()
        self.running = noid.start("console", vm, *options, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        self.seen = b""

    def types(self, keys: bytes) -> None:
        os.write(self.terminal, keys)

    def sees(self, wanted: bytes) -> None:
        deadline = time.monotonic() + PATIENCE_SECS
        while wanted not in self.seen:
            assert select.select([self.terminal], [], [], max(deadline - time.monotonic(), 0))[0], self.seen
            self.seen += os.read(self.terminal, 65536)
        self.seen = self.seen.partition(wanted)[2]

    def leaves(self) -> None:
        self.types(DETACH)
        self.sees(b"--- Detached ---")
        assert self.running.wait(PATIENCE_SECS) == 0


@contextlib.contextmanager
def console(noid: Any, vm: str, *options: str) -> Iterator[AtTheConsole]:
    someone = AtTheConsole(noid, vm, *options)
    try:
        yield someone
    finally:
        someone.running.kill()
        someone.running.wait(PATIENCE_SECS)
        os.close(someone.terminal)


def test_what_is_typed_at_the_console_runs_and_is_there_when_one_comes_back(noid: Any) -> None:
    noid.create("web")
    with console(noid, "web") as someone:
        someone.sees(b"Attached to 'web' serial console.")
        someone.types(b"echo $((6 * 7))ish\r")
        someone.sees(b"\n42ish\r\n")
        someone.leaves()
    with console(noid, "web") as someone:
        someone.sees(b"\n42ish\r\n")
        someone.leaves()
    assert b"\n42ish\r\n" in noid("logs", "web").out


def test_a_guest_that_prints_a_megabyte_is_held_up_by_nobody_stalled_killed_or_gone(house: Any) -> None:
    house.create("web")
    with house.start(
        "console", "web", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as stuck:
        try:
            stuck.stdin.write(b"yes $(seq 99) | head -c 1000000; echo done\r")
            stuck.stdin.flush()  # it stays attached, and nobody reads what it shows
            log = house.directory("web") / "serial.log"
            house.eventually(lambda: log.stat().st_size > 100_000)
            house.end_agent(signal.SIGKILL)
            assert house.ok("exec", "web", "--", "echo", "alive") == "alive"
            until = time.monotonic() + PATIENCE_SECS
            while log.stat().st_size < 1_000_000:
                assert time.monotonic() < until, log.stat().st_size
                time.sleep(0.1)  # the guest's time: it prints a quarter of a megabyte a second at best
        finally:
            stuck.kill()
    with console(house, "web", "--history", "0") as someone:  # of the next agent, which has adopted the machine
        someone.types(b"\recho back\r")
        someone.sees(b"\nback\r\n")
        someone.leaves()
