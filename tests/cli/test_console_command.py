"""``noid console`` in a terminal and in a pipe, and ``noid logs``: what is shown, and the terminal afterwards."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Callable
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
        assert someone.sees(b"\r\n") == b"Attached to 'web' serial console."
        assert someone.sees(b"\r\n") == b"Type 'exit' to detach."
        assert someone.sees(b"\r\n") == b"Or press Ctrl+], Ctrl+Q or ~. on a new line."
        someone.sees(b"login: ")
        someone.sees(b"{100,30}")
        assert not someone.has_the_terminal_back()
        for keys in (b"x", b"\x03", b"\x04", b"\x1a", b"\r", b"\x1b[A"):
            someone.types(keys)
            someone.sees(b"<" + keys + b">")
        someone.types(ESCAPE)
        someone.sees(b"\r\n--- Detached ---\r\n")
        assert someone.running.wait(PATIENCE_SECS) == 0
        assert someone.has_the_terminal_back()
    assert agent.requests[0].path == "/v1/vms/web/console?resume=1"


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
        assert b"Press Ctrl+P Ctrl+Q to detach." in someone.sees(b"login: ")
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
    assert done.stderr == b"Attached to 'web' serial console.\n"
    assert agent.requests[0].path == "/v1/vms/web/console?history=9&resume=1"


def test_a_watcher_types_nothing_and_leaves_with_ctrl_c(noid: Any, agent: Any) -> None:
    agent.runs(echoing)
    with noid.start(
        "console", "web", "--readonly", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        assert running.stdout.read(7) == b"login: "
        running.send_signal(signal.SIGINT)
        assert running.wait(PATIENCE_SECS) == 130
        assert running.stdin is not None
    assert agent.requests[0].path == "/v1/vms/web/console?readonly=1&resume=1"


def test_a_refusal_is_one_line_and_leaves_the_terminal_alone(person: Any, noid: Any, agent: Any) -> None:
    agent.answers(
        "GET", "/v1/vms/web/console?resume=1", 409, {"error": "cannot open the console of VM 'web': it is dead."}
    )
    with person(noid, "console", "web") as someone:
        someone.sees(b"Error: server error (409): cannot open the console of VM 'web': it is dead.")
        assert someone.running.wait(PATIENCE_SECS) == 1
        assert someone.has_the_terminal_back()


# --- what leaves -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [b"\x1d", b"\x11", b"\r~.", b"exit\r"],
    ids=["ctrl-]", "ctrl-q", "~.", "exit"],
)
def test_each_way_out_leaves_and_exit_is_wiped_not_entered(person: Any, noid: Any, agent: Any, keys: bytes) -> None:
    got: list[bytes] = []
    left = threading.Event()

    def recording(exchange: Any) -> None:
        try:
            exchange.send(1, b"# ")
            while (received := exchange.receive())[0] == "binary":
                if received[1][0] == 3:
                    got.append(received[1][1:])
        finally:
            left.set()

    agent.runs(recording)
    with person(noid, "console", "web") as someone:
        someone.sees(b"# ")
        for key in keys:
            someone.types(bytes((key,)))
        someone.sees(b"--- Detached ---")
        assert someone.running.wait(PATIENCE_SECS) == 0
        assert someone.has_the_terminal_back()
    assert left.wait(PATIENCE_SECS)
    assert b"".join(got) == keys.partition(b"~")[0].replace(b"exit\r", b"exit\x15").strip(b"\x1d\x11")


def test_the_ways_out_are_the_option_s_or_the_environment_s_or_the_setting_s(
    person: Any, noid: Any, agent: Any
) -> None:
    def told(*options: str) -> bytes:
        with person(noid, "console", "web", *options) as someone:
            text: bytes = someone.sees(b"login: ")
            return text.partition(b"console.\r\n")[2]

    agent.runs(echoing)
    assert told("--detach-keys", "~.") == b"Press ~. on a new line to detach.\r\n"
    assert told("--detach-keys", "") == b""
    (noid.home / ".noid").mkdir()
    settings = noid.home / ".noid" / "config.toml"
    settings.write_text('[console]\ndetach = "ctrl-q exit"\n')
    assert told() == b"Type 'exit' to detach.\r\nOr press Ctrl+Q.\r\n"
    noid.env["NOID_DETACH"] = "ctrl-a,d"
    assert told() == b"Press Ctrl+A 'd' to detach.\r\n"
    assert told("--detach-keys", "exit") == b"Type 'exit' to detach.\r\n"
    noid.env["NOID_DETACH"] = "nonsense"
    with person(noid, "console", "web") as someone:
        someone.sees(b"'nonsense' is no key")
        assert someone.running.wait(PATIENCE_SECS) == 1


def test_help_is_told_beside_the_guest_s_output(person: Any, noid: Any, agent: Any) -> None:
    agent.runs(echoing)
    with person(noid, "console", "web") as someone:
        someone.sees(b"login: ")
        someone.types(b"~?")
        someone.sees(b"[~. leaves   ~~ types one ~   ~? is this]")
        someone.types(b"x")
        someone.sees(b"<x>")


def test_an_editor_s_exit_is_text_and_its_screen_is_left_too(person: Any, noid: Any, agent: Any) -> None:
    def editing(exchange: Any) -> None:
        exchange.send(1, b"\x1b[?1049h\x1b[?2004;1000h\x1b[?25l")
        echoing(exchange)

    agent.runs(editing)
    with person(noid, "console", "web") as someone:
        someone.sees(b"login: ")
        for key in b"exit\r":
            someone.types(bytes((key,)))
        someone.sees(b"\r>")
        someone.types(ESCAPE)
        someone.sees(b"\x1b[?25h\x1b[?1000l\x1b[?1049l\x1b[?2004l\x1b[0m")
        someone.sees(b"--- Detached ---")


def test_the_terminal_is_ours_while_we_are_stopped(person: Any, noid: Any, agent: Any) -> None:
    agent.runs(echoing)
    with person(noid, "console", "web") as someone:
        someone.sees(b"login: ")
        os.kill(someone.running.pid, signal.SIGTSTP)
        os.waitid(os.P_PID, someone.running.pid, os.WSTOPPED | os.WNOWAIT)
        assert someone.has_the_terminal_back()
        os.kill(someone.running.pid, signal.SIGCONT)
        deadline = time.monotonic() + PATIENCE_SECS
        while someone.has_the_terminal_back():
            assert time.monotonic() < deadline
        someone.types(b"\x03")
        someone.sees(b"<\x03>")
        assert not someone.has_the_terminal_back()


# --- the agent is started anew ---------------------------------------------------------------------------------------


def one_after_the_other(*scripts: Callable[[Any], None]) -> Callable[[Any], None]:
    left = list(scripts)
    return lambda exchange: left.pop(0)(exchange)


def test_a_console_goes_on_at_the_byte_where_its_connection_was_lost(person: Any, noid: Any, agent: Any) -> None:
    def first(exchange: Any) -> None:
        exchange.send_json(log={"offset": 1000, "lineage": "279168461aa8"})
        exchange.send(1, b"before")
        exchange.send_json(gap={"start": 1006, "end": 2000})
        exchange.send(1, b"login: ")
        exchange.receive()

    def second(exchange: Any) -> None:
        exchange.send_json(log={"offset": 2007, "lineage": "279168461aa8"})
        echoing(exchange)

    agent.runs(one_after_the_other(first, second))
    with person(noid, "console", "web") as someone:
        someone.sees(b"login: ")
        someone.sees(b"[the connection is lost; attaching again]")
        someone.sees(b"[attached again]")
        someone.sees(b"{100,30}")
        someone.types(b"x")
        someone.sees(b"<x>")
        someone.types(ESCAPE)
        assert someone.running.wait(PATIENCE_SECS) == 0
    assert agent.requests[1].path == "/v1/vms/web/console?offset=2007&lineage=279168461aa8&resume=1"


def test_questions_to_the_terminal_are_shown_when_they_are_asked_and_not_from_history(
    person: Any, noid: Any, agent: Any
) -> None:
    def asking(exchange: Any) -> None:
        exchange.send_json(log={"offset": 90, "lineage": "l", "now": 100})
        exchange.send(1, b"old\x1b[")
        exchange.send(1, b"6n!!new\x1b[6n.")  # two characters of it are old
        exchange.receive()

    agent.runs(asking)
    with person(noid, "console", "web") as someone:
        assert someone.sees(b"new\x1b[6n.").endswith(b"old!!")


def test_a_console_whose_vm_was_put_back_meanwhile_shows_the_new_one(person: Any, noid: Any, agent: Any) -> None:
    def first(exchange: Any) -> None:
        exchange.send_json(log={"offset": 0, "lineage": "old"})
        exchange.receive()

    agent.answers(
        "GET", "/v1/vms/web/console?offset=0&lineage=old&resume=1", 409, {"error": "put back", "code": "lineage"}
    )
    agent.runs(one_after_the_other(first, echoing))
    agent.refuses("/v1/vms/web/console?offset=0&lineage=old&resume=1")
    with person(noid, "console", "web") as someone:
        someone.sees(b"[the VM was put back to a checkpoint; this is its console since then]")
        someone.sees(b"login: ")


def test_one_can_leave_while_nobody_answers_and_a_refusal_ends_it(person: Any, noid: Any, agent: Any) -> None:
    def first(exchange: Any) -> None:
        exchange.send_json(log={"offset": 0, "lineage": "old"})
        exchange.receive()

    again = "/v1/vms/web/console?offset=0&lineage=old&resume=1"
    agent.refuses(again)
    agent.answers("GET", again, 503, {"error": "starting"})
    agent.runs(first)
    with person(noid, "console", "web") as someone:
        someone.sees(b"attaching again]")
        someone.types(ESCAPE)
        someone.sees(b"--- Detached ---")
        assert someone.running.wait(PATIENCE_SECS) == 0
        assert someone.has_the_terminal_back()
    agent.answers("GET", again, 409, {"error": "it is stopped", "code": "conflict"})
    with person(noid, "console", "web") as someone:
        someone.sees(b"Trying again failed: server error (409): it is stopped")
        assert someone.running.wait(PATIENCE_SECS) == 1
        assert someone.has_the_terminal_back()


def test_a_log_that_is_followed_goes_on_where_its_connection_was_lost(noid: Any, agent: Any) -> None:
    def first(exchange: Any) -> None:
        exchange.send_json(log={"offset": 5, "lineage": "l"})
        exchange.send(1, b"one\n")

    def second(exchange: Any) -> None:
        exchange.send_json(log={"offset": 9, "lineage": "l"})
        exchange.send(1, b"two\n")
        exchange.send_json(end={"offset": 13})

    agent.runs(one_after_the_other(first, second, first, second))
    done = noid("logs", "web", "-f")
    assert (done.returncode, done.stdout) == (0, b"one\ntwo\n")
    assert done.stderr == b"\n[the connection is lost; reading again]\n\n[reading again from where it was]\n"
    assert agent.requests[1].path == "/v1/vms/web/logs/console?offset=9&follow=1&resume=1&lineage=l"
    done = noid("logs", "web", "-f", "--json")
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {"offset": 5, "stream": "stdout", "text": "one\n"},
        {"offset": 9, "stream": "stdout", "text": "two\n"},
        {"end": 13},
    ]


def test_followed_as_json_a_character_that_was_cut_is_whole(noid: Any, agent: Any) -> None:
    def cut(exchange: Any) -> None:
        exchange.send_json(log={"offset": 0})
        exchange.send(1, b"a\xc3")
        exchange.send(2, b"err")
        exchange.send(1, b"\xa9\xff")
        exchange.send_json(gap={"start": 7, "end": 9})
        exchange.send_json(end={"offset": 9})

    agent.runs(cut)
    done = noid("logs", "web", "-f", "--json")
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {"offset": 0, "stream": "stdout", "text": "a"},
        {"offset": 2, "stream": "stderr", "text": "err"},
        {"offset": 4, "stream": "stdout", "text": "\u00e9\ufffd"},
        {"gap": {"start": 7, "end": 9}},
        {"end": 9},
    ]


# --- variables -------------------------------------------------------------------------------------------------------


def test_variables_are_exported_first_and_nothing_of_that_is_shown(noid: Any, agent: Any) -> None:
    got: list[bytes] = []

    def shell(exchange: Any) -> None:
        exchange.send(1, b"# ")
        typed = b""
        while typed.count(b"\r") < 3:
            typed += exchange.receive()[1][1:]
        got.append(typed)
        mark = typed.rpartition(b" echo ")[2].replace(b"''", b"").strip()
        exchange.send(1, typed.replace(b"\r", b"\r\n") + mark[:9])
        exchange.send(1, mark[9:] + b"\r\n# ")
        echoing(exchange)

    agent.runs(shell)
    done = noid("console", "web", "-e", "A=it's", "--env", "B=2", stdin=b"ls\n")
    assert (done.returncode, done.stdout) == (0, b"\r\n# login: <ls\n>")
    assert got[0].startswith(b" export A='it'\\''s'\r export B='2'\r echo __NOID_ENV''_SYNC_")
    assert noid("console", "web", "-e", "A=\x03").returncode == 2
    assert noid("console", "web", "-e", "A").returncode == 2


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
    assert agent.requests[0].path == f"/v1/vms/web/logs/console?offset={1 << 59}&follow=1&resume=1"
