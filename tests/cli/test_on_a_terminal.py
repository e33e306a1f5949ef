"""What a person at a terminal sees and a pipe does not: progress, and ``exec -t``."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import threading
import time
from typing import Any

import pytest

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


def test_a_terminal_shows_states_and_errors_in_colour_and_tables_in_the_same_shape(
    person: Any, noid: Any, agent: Any
) -> None:
    silent = VM | {"name": "db", "responding": False}
    agent.answers("GET", "/v1/vms", 200, [VM, silent, VM | {"name": "old", "state": "stopped"}])
    agent.answers("GET", "/v1/vms/web", 200, VM)
    piped = noid("list").stdout.decode()
    noid.env.pop("NO_COLOR")
    with person(noid, "list") as someone:
        assert someone.running.wait(PATIENCE_SECS) == 0
        shown = someone.sees(b"old") + someone.sees(b"+\r\n")
    assert b"| \x1b[32mrunning\x1b[0m          |" in shown
    assert b"| \x1b[31mrunning (silent)\x1b[0m |" in shown
    assert re.sub(rb"\x1b\[[0-9;]*m", b"", shown).replace(b"\r", b"") in piped.encode().replace(b"old", b"", 1)
    with person(noid, "info", "web") as someone:
        someone.sees(b"State:   \x1b[32mrunning\x1b[0m")
    with person(noid, "nope") as someone:
        someone.sees(b"\x1b[1;31mError:\x1b[0m No such command")


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"NO_COLOR": "1", "FORCE_COLOR": "1"}])
def test_nobody_gets_colours_who_does_not_want_them(person: Any, noid: Any, agent: Any, env: dict[str, str]) -> None:
    agent.answers("GET", "/v1/vms", 200, [VM])
    noid.env.pop("NO_COLOR")
    noid.env |= env
    with person(noid, "list") as someone:
        assert b"\x1b" not in someone.sees(b"2026") + someone.sees(b"+\r\n")


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "CLICOLOR_FORCE"])
def test_a_pipe_gets_colours_only_where_somebody_insists(noid: Any, agent: Any, variable: str) -> None:
    agent.answers("GET", "/v1/vms", 200, [VM])
    noid.env.pop("NO_COLOR")
    assert b"\x1b" not in noid("list").stdout + noid("nope").stderr
    assert b"\x1b" not in noid("list", **{variable: "0"}).stdout
    assert b"\x1b[32mrunning\x1b[0m" in noid("list", **{variable: "1"}).stdout
    assert b"\x1b" not in noid("list", **{variable: "1", "NO_COLOR": "1"}).stdout


def test_a_narrow_terminal_cuts_what_ran_and_no_name(person: Any, noid: Any, agent: Any) -> None:
    ran = {
        "id": "8f0a12bc", "pid": 7, "command": ["make", "x" * 80], "state": "running", "exit_code": None,
        "origin": "exec", "started_at": "2026-01-02T03:04:05Z",
    }  # fmt: skip
    agent.answers("GET", "/v1/vms/web/processes", 200, [ran])
    with person(noid, "ps", "web") as someone:
        someone.sees(b"8f0a12bc")
        assert "make xxx" in someone.sees("… |\r\n".encode()).decode()


# --- questions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [b"n\n", b"\n", b"\x04", b"no\n", b"\xff\n", b"yes?\n"])
def test_who_does_not_say_yes_destroys_nothing(person: Any, noid: Any, agent: Any, answer: bytes) -> None:
    with person(noid, "destroy", "web", "db") as someone:
        someone.sees(b"Destroy VMs 'web', 'db'? [y/N] ")
        someone.types(answer)
        someone.sees(b"Nothing was changed.")
        assert someone.running.wait(PATIENCE_SECS) == 1
    assert agent.requests == []


@pytest.mark.parametrize("answer", [b"y\n", b" YES \n"])
def test_who_says_yes_destroys_what_was_named(person: Any, noid: Any, agent: Any, answer: bytes) -> None:
    agent.answers("DELETE", "/v1/vms/web", 204)
    with person(noid, "destroy", "web") as someone:
        someone.sees(b"Destroy VM 'web'? [y/N] ")
        someone.types(answer)
        someone.sees(b"VM 'web' destroyed")
        assert someone.running.wait(PATIENCE_SECS) == 0


@pytest.mark.parametrize("option", ["-y", "--yes", "--json", "-q"])
def test_nobody_is_asked_who_said_yes_before_or_is_a_script(person: Any, noid: Any, agent: Any, option: str) -> None:
    agent.answers("DELETE", "/v1/vms/web", 204)
    with person(noid, "destroy", "web", option) as someone:
        assert someone.running.wait(PATIENCE_SECS) == 0
        assert b"?" not in someone.seen
    assert [request.method for request in agent.requests] == ["DELETE"]


# --- exec -t and attach -t -------------------------------------------------------------------------------------------

CTRL_P, CTRL_Q = b"\x10", b"\x11"
STARTED = {"process": "8f0a12bc", "lineage": "1", "pid": 7, "offset": 0, "stdin": 0}


def keys_and_sizes(exchange: Any) -> None:
    """A program in a terminal of the guest that shows every key and every size, and ends with q."""
    exchange.send_json(**STARTED)
    while (received := exchange.receive())[0] in ("binary", "text"):
        if received[0] == "text":
            asked = json.loads(received[1])
            if asked == {"detach": True}:
                exchange.send_json(detached=True)
                return
            assert (asked["tty"], asked["columns"], asked["rows"]) == (True, 100, 30)
            assert asked["env"] == ["TERM=noid-test"]
            continue
        channel, data = received[1][0], received[1][1:]
        if data == b"q":
            exchange.end(7)
            return
        exchange.send(1, b"{%d,%d}" % struct.unpack("!HH", data) if channel == 4 else b"<" + data + b">")


def test_a_command_gets_the_terminal_its_size_and_every_key(person: Any, noid: Any, agent: Any) -> None:
    agent.runs(keys_and_sizes)
    with person(noid, "exec", "web", "-t", "--", "vi") as someone:
        someone.sees(b"{100,30}")
        assert not someone.has_the_terminal_back()
        for keys in (b"x", b"\x03", b"\x04", b"\x1a", b"\x1c", b"\r", b"\x1b[A", b"\x1d"):
            someone.types(keys)
            someone.sees(b"<" + keys + b">")
        someone.resize(132, 43)
        os.kill(someone.running.pid, signal.SIGWINCH)  # a terminal without a session leader tells nobody by itself
        someone.sees(b"{132,43}")
        someone.types(b"q")
        assert someone.running.wait(PATIENCE_SECS) == 7
        assert someone.has_the_terminal_back()


@pytest.mark.parametrize("command", [("exec", "web", "-t", "--", "vi"), ("attach", "web", "8f0a12bc", "-t")])
@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGHUP])
def test_the_terminal_is_given_back_when_the_client_is_ended(
    person: Any, noid: Any, agent: Any, command: tuple[str, ...], signo: signal.Signals
) -> None:
    agent.runs(keys_and_sizes)
    with person(noid, *command) as someone:
        someone.sees(b"{100,30}")
        assert not someone.has_the_terminal_back()
        os.kill(someone.running.pid, signo)
        assert someone.running.wait(PATIENCE_SECS) == 128 + signo
        assert someone.has_the_terminal_back()


def test_the_keys_that_leave_a_command_may_be_others(person: Any, noid: Any, agent: Any) -> None:
    agent.runs(keys_and_sizes)
    for command in (("exec", "web", "-t", "--detach-keys", "ctrl-],.", "--", "vi"),
                    ("attach", "web", "8f0a12bc", "-t", "--detach-keys", "ctrl-],.")):  # fmt: skip
        with person(noid, *command) as someone:
            someone.sees(b"{100,30}")
            someone.types(CTRL_P + CTRL_Q)
            someone.sees(b"<" + CTRL_P + CTRL_Q + b">")
            someone.types(b"\x1d")
            someone.types(b"a")
            someone.sees(b"<\x1da>")  # half of them, held back until it was clear
            someone.types(b"\x1d.")
            someone.sees(b"Detached; it runs on.")
            assert someone.running.wait(PATIENCE_SECS) == 0
            assert someone.has_the_terminal_back()
