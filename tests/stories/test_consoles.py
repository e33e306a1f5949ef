"""The serial console of a real VM: typed on, left, come back to, and never the guest's problem."""

from __future__ import annotations

import signal
import subprocess
import time
from typing import Any

import pytest

from noid.testing.pace import slowness
from noid.testing.person import Person

pytestmark = pytest.mark.vm

PATIENCE_SECS = 60.0 * slowness()
DETACH = b"\x1d"


def leaves(someone: Person) -> None:
    someone.types(DETACH)
    someone.sees(b"--- Detached ---")
    assert someone.running.wait(PATIENCE_SECS) == 0
    assert someone.has_the_terminal_back()


def test_what_is_typed_at_the_console_runs_and_is_there_when_one_comes_back(noid: Any) -> None:
    noid.create("web")
    with Person.typing(noid, "console", "web") as someone:
        someone.sees(b"Attached to 'web' serial console.")
        someone.types(b"echo $((6 * 7))ish\r")
        someone.sees(b"\n42ish\r\n")
        leaves(someone)
    with Person.typing(noid, "console", "web") as someone:
        someone.sees(b"\n42ish\r\n")
        leaves(someone)
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
    with Person.typing(
        house, "console", "web", "--history", "0"
    ) as someone:  # of the next agent, which has adopted the machine
        someone.types(b"\recho back\r")
        someone.sees(b"\nback\r\n")
        leaves(someone)
