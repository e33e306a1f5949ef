"""What a person at a terminal sees and a pipe does not: progress."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import threading
import time
from typing import Any

PATIENCE_SECS = 20.0
VM = {"name": "web", "state": "running", "cpus": 1, "mem_mib": 512, "created_at": "2026-01-02 03:04:05"}


def test_a_long_create_counts_the_seconds_on_stderr_and_leaves_no_trace(noid: Any, agent: Any) -> None:
    seen = threading.Event()
    answer = agent.answer_of

    def when_seen(method: str, path: str) -> bytes:
        assert seen.wait(PATIENCE_SECS)
        return bytes(answer(method, path))

    agent.answers("POST", "/v1/vms", 201, VM)
    agent.answer_of = when_seen
    terminal, theirs = pty.openpty()
    try:
        with noid.start("create", "web", stdout=subprocess.PIPE, stderr=theirs) as running:
            shown = b""
            deadline = time.monotonic() + PATIENCE_SECS
            while b"Creating VM 'web' ... " not in shown:
                assert select.select([terminal], [], [], max(deadline - time.monotonic(), 0))[0]
                shown += os.read(terminal, 1024)
            seen.set()
            assert running.stdout is not None
            assert running.stdout.read() == b"VM 'web' created (state: running)\n"
        while select.select([terminal], [], [], 0)[0]:
            shown += os.read(terminal, 1024)
    finally:
        os.close(theirs)
        os.close(terminal)
    assert shown.endswith(b"\r\x1b[K")  # back to the line's beginning, the line erased
    assert b"\n" not in shown


def test_with_i_what_is_typed_reaches_the_guest_and_ctrl_d_ends_it(noid: Any, agent: Any) -> None:
    def script(exchange: Any) -> None:
        exchange.request()
        while (message := exchange.receive()[1]) != b"\x03":
            exchange.send(1, b"<" + message[1:] + b">")
        exchange.end(0)

    agent.runs(script)
    terminal, theirs = pty.openpty()
    try:
        with noid.start("exec", "web", "-i", "--", "cat", stdin=theirs, stdout=subprocess.PIPE) as running:
            assert running.stdout is not None
            os.write(terminal, b"hello\n")
            assert running.stdout.read(8) == b"<hello\n>"
            os.write(terminal, b"\x04")
            assert running.wait(PATIENCE_SECS) == 0
    finally:
        os.close(theirs)
        os.close(terminal)
