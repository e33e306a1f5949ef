"""``noid console`` in a terminal and in a pipe, and ``noid logs``: what is shown, and the terminal afterwards."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
from typing import Any

import pytest

from noid.client.terminal import DetachKeys

PATIENCE_SECS = 20.0
ESCAPE = b"\x1d"


def echoing(exchange: Any) -> None:
    """A guest that shows every key in angle brackets, and every size."""
    exchange.send(1, b"login: ")
    while (received := exchange.receive())[0] == "binary":
        channel, data = received[1][0], received[1][1:]
        if channel == 3:
            exchange.send(1, b"<" + data + b">")
        elif channel == 4:
            exchange.send(1, b"{%d,%d}" % struct.unpack("!HH", data))


def test_every_key_goes_to_the_guest_until_the_detach_key_and_the_terminal_is_given_back(
    person: Any, noid: Any, agent: Any
) -> None:
    agent.runs(echoing)
    with person(noid, "console", "web") as someone:
        assert someone.sees(b"\r\n") == b"Attached to the serial console of 'web'. Leave with Ctrl+]."
        someone.sees(b"login: ")
        someone.sees(b"{100,30}")
        assert not someone.has_the_terminal_back()
        for keys in (b"x", b"\x03", b"\x04", b"\x1a", b"\r", b"\x1b[A"):
            someone.types(keys)
            someone.sees(b"<" + keys + b">")
        someone.types(ESCAPE)
        someone.sees(b"Detached. The VM runs on.")
        assert someone.running.wait(PATIENCE_SECS) == 0
        assert someone.has_the_terminal_back()
    assert agent.requests[0].path == "/v1/vms/web/console"


def test_a_window_that_changes_its_size_is_told_to_the_guest(person: Any, noid: Any, agent: Any) -> None:
    agent.runs(echoing)
    with person(noid, "console", "web") as someone:
        someone.sees(b"{100,30}")
        someone.resize(132, 43)
        os.kill(someone.running.pid, signal.SIGWINCH)  # a terminal without a session leader tells nobody by itself
        someone.sees(b"{132,43}")


@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_the_terminal_is_given_back_when_the_command_is_ended(
    person: Any, noid: Any, agent: Any, signo: signal.Signals
) -> None:
    agent.runs(echoing)
    with person(noid, "console", "web") as someone:
        someone.sees(b"{100,30}")
        os.kill(someone.running.pid, signo)
        assert someone.running.wait(PATIENCE_SECS) == 128 + signo
        assert someone.has_the_terminal_back()


def test_the_terminal_is_given_back_when_the_agent_goes_away_or_detaches(person: Any, noid: Any, agent: Any) -> None:
    def leaving(exchange: Any) -> None:
        exchange.receive()

    agent.runs(leaving)
    with person(noid, "console", "web") as someone:
        someone.sees(b"it closed the connection. The VM is not affected.")
        assert someone.running.wait(PATIENCE_SECS) == 1
        assert someone.has_the_terminal_back()

    def detaching(exchange: Any) -> None:
        exchange.send_json(dropped={"bytes": 3, "why": "the guest does not read"})
        exchange.send_json(error="nothing was typed for an hour", code="deadline")

    agent.runs(detaching)
    with person(noid, "console", "web") as someone:
        someone.sees(b"[the guest does not read]")
        someone.sees(b"Error: nothing was typed for an hour")
        assert someone.running.wait(PATIENCE_SECS) == 1
        assert someone.has_the_terminal_back()


def test_detach_keys_may_be_others_and_a_half_of_them_is_typed(person: Any, noid: Any, agent: Any) -> None:
    agent.runs(echoing)
    with person(noid, "console", "web", "--detach-keys", "ctrl-p,ctrl-q") as someone:
        assert b"Leave with Ctrl+P, Ctrl+Q." in someone.sees(b"login: ")
        someone.types(ESCAPE)
        someone.sees(b"<" + ESCAPE + b">")
        someone.types(b"\x10")
        someone.types(b"a")
        someone.sees(b"<\x10a>")
        someone.types(b"\x10\x11")
        assert someone.running.wait(PATIENCE_SECS) == 0


def test_an_unknown_detach_key_is_wrong_usage(noid: Any) -> None:
    done = noid("console", "web", "--detach-keys", "ctrl-]]")
    assert done.returncode == 2
    assert b"'ctrl-]]' is no key" in done.stderr


def test_from_a_pipe_what_is_read_is_typed_and_what_is_shown_is_all_there_is_on_stdout(noid: Any, agent: Any) -> None:
    agent.runs(echoing)
    done = noid("console", "web", "--history", "9", stdin=b"ls\n" + ESCAPE)
    assert (done.returncode, done.stdout) == (0, b"login: <ls\n" + ESCAPE + b">")
    assert done.stderr == b"Attached to the serial console of 'web'.\n"
    assert agent.requests[0].path == "/v1/vms/web/console?history=9"


def test_a_watcher_types_nothing_and_leaves_with_ctrl_c(noid: Any, agent: Any) -> None:
    agent.runs(echoing)
    with noid.start(
        "console", "web", "--readonly", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        assert running.stdout.read(7) == b"login: "
        running.send_signal(signal.SIGINT)
        assert running.wait(PATIENCE_SECS) == 130
        assert running.stdin is not None
    assert agent.requests[0].path == "/v1/vms/web/console?readonly=1"


def test_a_refusal_is_one_line_and_leaves_the_terminal_alone(person: Any, noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/vms/web/console", 409, {"error": "cannot open the console of VM 'web': it is dead."})
    with person(noid, "console", "web") as someone:
        someone.sees(b"Error: server error (409): cannot open the console of VM 'web': it is dead.")
        assert someone.running.wait(PATIENCE_SECS) == 1
        assert someone.has_the_terminal_back()


@pytest.mark.parametrize(
    ("keys", "pieces", "typed", "detached"),
    [
        (b"", [b"\x1d", b"a"], b"\x1da", False),
        (b"\x1d", [b"ab\x1dcd"], b"ab", True),
        (b"aab", [b"aaab"], b"a", True),
        (b"aab", [b"a", b"a", b"c"], b"aac", False),
        (b"abac", [b"ababac"], b"ab", True),
        (b"\x10\x11", [b"\x10\x10\x11"], b"\x10", True),
    ],
)
def test_detach_keys_are_found_however_they_come(
    keys: bytes, pieces: list[bytes], typed: bytes, detached: bool
) -> None:
    finder = DetachKeys(keys)
    found = [finder.feed(piece) for piece in pieces]
    assert (b"".join(part for part, _ in found), found[-1][1]) == (typed, detached)


# --- noid logs -------------------------------------------------------------------------------------------------------


def with_a_gap(exchange: Any) -> None:
    exchange.send_json(log={"offset": 10})
    exchange.send(1, b"before\n")
    exchange.send_json(gap={"start": 17, "end": 117})
    exchange.send(2, b"after\n")
    exchange.send_json(end={"offset": 123})


def test_a_log_is_printed_with_its_gaps_told_on_stderr(noid: Any, agent: Any) -> None:
    agent.runs(with_a_gap)
    done = noid("logs", "web", "--tail", "113")
    assert (done.returncode, done.stdout) == (0, b"before\n")
    assert done.stderr == b"\n[100 bytes are no longer kept]\nafter\n"
    assert agent.requests[0].path == "/v1/vms/web/logs/console?offset=-113"


def test_as_json_a_log_is_one_object(noid: Any, agent: Any) -> None:
    agent.runs(with_a_gap)
    done = noid("logs", "web", "0a1b2c3d", "--json")
    assert json.loads(done.stdout) == {
        "log": "0a1b2c3d", "start": 10, "end": 123, "gaps": [{"start": 17, "end": 117}], "text": "before\nafter\n",
    }  # fmt: skip
    assert agent.requests[0].path == "/v1/vms/web/logs/0a1b2c3d?offset=0"


def test_a_log_that_is_cut_in_the_middle_is_no_success(noid: Any, agent: Any) -> None:
    agent.runs(lambda exchange: exchange.send_json(log={"offset": 0}))
    done = noid("logs", "web", "--follow", "--tail", "0")
    assert done.returncode == 1
    assert b"Error: connection error" in done.stderr
    assert agent.requests[0].path == f"/v1/vms/web/logs/console?offset={1 << 59}&follow=1"
