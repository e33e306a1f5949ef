"""``noid exec``: a guest's command as if it ran here: bytes, exit codes, input, interruptions."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

PATIENCE_SECS = 20.0


def test_output_goes_where_the_guest_wrote_it_byte_for_byte(noid: Any, agent: Any) -> None:
    everything = bytes(range(256)) * 300

    def script(exchange: Any) -> None:
        exchange.request()
        exchange.send(1, everything[:1000])
        exchange.send(2, b"oops")
        exchange.send(9, b"a channel of the future")
        exchange.send(1, b"")
        exchange.send(1, everything[1000:])
        exchange.send_json(note="a message of the future")
        exchange.end(0)

    agent.runs(script)
    done = noid("exec", "web", "--", "true")
    assert (done.returncode, done.stdout, done.stderr) == (0, everything, b"oops")


def test_the_request_carries_the_command_untouched(noid: Any, agent: Any) -> None:
    requests: list[Any] = []

    def script(exchange: Any) -> None:
        requests.append(exchange.request())
        exchange.end(0)

    agent.runs(script)
    odd = b"caf\xe9"  # not UTF-8
    done = noid(
        *("exec", "web", "-n", "-e", "A=1", "--env", "B=x=y", "-u", "root", "-w", "/srv", "--timeout", "2.5"),
        *("--", "sh", "-c", "echo '$HOME' \"\n\"", "--", "-e", "", odd),
    )
    assert done.returncode == 0
    assert requests == [
        {
            "command": ["sh", "-c", "echo '$HOME' \"\n\"", "--", "-e", "", os.fsdecode(odd)],
            "tty": False,
            "env": ["A=1", "B=x=y"],
            "cwd": "/srv",
            "user": "root",
            "timeout_secs": 2.5,
            "resume": True,
        }
    ]
    assert agent.requests[0].path == "/v1/vms/web/exec"


@pytest.mark.parametrize("code", [0, 1, 42, 126, 127, 137, 255])
def test_the_exit_code_is_the_guest_s(noid: Any, agent: Any, code: int) -> None:
    agent.runs(lambda exchange: (exchange.request(), exchange.end(code)))
    assert noid("exec", "web", "--", "x").returncode == code


def test_a_timeout_is_124(noid: Any, agent: Any) -> None:
    agent.runs(lambda exchange: (exchange.request(), exchange.end(None, timed_out=True)))
    done = noid("exec", "web", "--", "sleep", "9")
    assert (done.returncode, done.stderr) == (124, b"exec timed out\n")


def test_truncated_output_is_said(noid: Any, agent: Any) -> None:
    agent.runs(lambda exchange: (exchange.request(), exchange.end(3, truncated=True)))
    done = noid("exec", "web", "--", "x")
    assert (done.returncode, done.stderr) == (3, b"warning: output was truncated (exceeded 1MB limit)\n")


@pytest.mark.parametrize("close", [True, False], ids=["closed politely", "dropped"])
def test_a_connection_lost_before_the_result_is_125_and_never_0(noid: Any, agent: Any, close: bool) -> None:
    def script(exchange: Any) -> None:
        from wsproto.events import CloseConnection

        exchange.request()
        exchange.send(1, b"half")
        if close:
            exchange.sock.sendall(exchange.ws.send(CloseConnection(code=1012)))

    agent.runs(script)
    done = noid("exec", "web", "--", "x")
    assert (done.returncode, done.stdout) == (125, b"half")
    assert done.stderr.startswith(b"Error: connection error: ")


def test_an_exit_code_nobody_knows_is_125(noid: Any, agent: Any) -> None:
    agent.runs(lambda exchange: (exchange.request(), exchange.end(None)))
    assert noid("exec", "web", "--", "x").returncode == 125


def test_nobody_listening_is_125(noid: Any) -> None:
    assert noid("--server", "unix:///nowhere/agent.sock", "exec", "web", "--", "x").returncode == 125


def test_an_error_before_the_upgrade_is_shown_in_the_server_s_words(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/vms/web/exec", 404, {"error": "VM 'web' not found"})
    done = noid("exec", "web", "--", "x")
    assert (done.returncode, done.stderr) == (
        125,
        b"Error: server error (404): VM 'web' not found. See which there are with: noid list\n",
    )


def test_an_error_after_the_upgrade_is_shown_in_the_server_s_words(noid: Any, agent: Any) -> None:
    agent.runs(lambda exchange: (exchange.request(), exchange.send_json(error="no such user: bob", code="invalid")))
    done = noid("exec", "web", "-u", "bob", "--", "x")
    assert (done.returncode, done.stderr) == (125, b"Error: no such user: bob\n")


def test_an_agent_that_lost_the_guest_does_not_know_the_result_either(noid: Any, agent: Any) -> None:
    agent.runs(lambda exchange: (exchange.request(), exchange.send_json(error="the VM ended", code="unavailable")))
    done = noid("exec", "web", "--", "x")
    assert (done.returncode, done.stderr) == (125, b"Error: connection error: the VM ended\n")


def test_the_command_is_only_what_comes_after_two_dashes(noid: Any, agent: Any) -> None:
    assert noid("exec", "web", "ls").returncode == 2
    done = noid("exec", "web", "-u", "root")
    assert done.returncode == 2
    assert b"noid exec web -- " in done.stderr
    assert agent.requests == []


def test_without_a_command_it_is_the_console(noid: Any, agent: Any) -> None:
    agent.runs(lambda exchange: (exchange.send(1, b"login: "), exchange.receive()))
    done = noid("exec", "web")
    assert (done.returncode, done.stdout) == (0, b"login: ")
    assert agent.requests[0].path == "/v1/vms/web/console?resume=1"


def echo(exchange: Any) -> None:
    assert exchange.request()["stdin"] is True
    while True:
        kind, data = exchange.receive()
        assert kind == "binary"
        assert data[0] == 3
        if data == b"\x03":
            break
        exchange.send(1, data[1:])
    exchange.end(0)


@pytest.mark.parametrize("size", [0, 1, 3_000_000])
def test_with_i_a_pipe_is_forwarded_to_its_end(noid: Any, agent: Any, size: int) -> None:
    data = os.urandom(size)
    agent.runs(echo)
    done = noid("exec", "web", "-i", "--", "cat", stdin=data)
    assert done.returncode == 0
    assert done.stdout == data


def test_with_i_a_file_and_dev_null_are_forwarded_too(noid: Any, agent: Any) -> None:
    agent.runs(echo)
    (noid.cwd / "file").write_bytes(b"content")
    assert noid.sh("noid exec web -i -- cat < file").stdout == b"content"
    assert noid.sh("noid exec web -i -- cat < /dev/null").stdout == b""


def test_a_guest_that_writes_before_it_reads_does_not_lock_up(noid: Any, agent: Any) -> None:
    size = 8_000_000  # more than every buffer between the two holds

    def script(exchange: Any) -> None:
        exchange.request()
        for _ in range(size // 50_000):
            exchange.send(1, b"o" * 50_000)
        received = 0
        while (message := exchange.receive()[1]) != b"\x03":
            received += len(message) - 1
        exchange.send(2, str(received).encode())
        exchange.end(0)

    agent.runs(script)
    done = noid("exec", "web", "-i", "--", "x", stdin=b"i" * size)
    assert (len(done.stdout), done.stderr) == (size, str(size).encode())


def test_a_guest_that_ends_before_its_input_does_ends_the_command(noid: Any, agent: Any) -> None:
    agent.runs(lambda exchange: (exchange.request(), exchange.send(1, b"enough"), exchange.end(5)))
    done = noid.sh("yes | noid exec web -i -- head -1; echo ${PIPESTATUS[@]}")
    assert (done.stdout, done.stderr) == (b"enough141 5\n", b"")


def test_a_message_in_many_pieces_has_its_channel_in_front_once(noid: Any, agent: Any) -> None:
    def script(exchange: Any) -> None:
        from wsproto.events import BytesMessage

        exchange.request()
        for data, finished in ((b"", False), (b"\x02e", False), (b"rr", False), (b"\x01", True)):
            exchange.sock.sendall(exchange.ws.send(BytesMessage(data=data, message_finished=finished)))
        exchange.end(0)

    agent.runs(script)
    assert noid("exec", "web", "--", "x").stderr == b"err\x01"


def test_json_collects_everything_into_one_object(noid: Any, agent: Any) -> None:
    def script(exchange: Any) -> None:
        exchange.request()
        exchange.send(1, b"out\xff")
        exchange.send(2, b"err")
        exchange.end(137, signal=9)

    agent.runs(script)
    done = noid("exec", "web", "--json", "--", "x")
    assert done.returncode == 137
    assert json.loads(done.stdout) == {
        "exit_code": 137,
        "signal": 9,
        "timed_out": False,
        "truncated": False,
        "stdout": "out\ufffd",
        "stderr": "err",
    }


def test_ctrl_c_ends_the_connection_and_says_130(noid: Any, agent: Any) -> None:
    started = threading.Event()
    ended: SimpleQueue[str] = SimpleQueue()

    def script(exchange: Any) -> None:
        exchange.request()
        started.set()
        ended.put(exchange.receive()[0])

    agent.runs(script)
    with noid.start("exec", "web", "--", "sleep", "9", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert started.wait(PATIENCE_SECS)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=PATIENCE_SECS)
    assert (running.returncode, out, err) == (130, b"", b"")
    assert ended.get(timeout=PATIENCE_SECS) in ("close", "gone")  # politely, unless just in the middle of sending


def test_output_arrives_while_the_command_runs(noid: Any, agent: Any) -> None:
    read = threading.Event()

    def script(exchange: Any) -> None:
        exchange.request()
        exchange.send(1, b"first")
        assert read.wait(PATIENCE_SECS)
        exchange.end(0)

    agent.runs(script)
    with noid.start("exec", "web", "--", "x", stdout=subprocess.PIPE) as running:
        assert running.stdout.read(5) == b"first"
        read.set()
        assert running.wait(PATIENCE_SECS) == 0


def test_a_reader_that_leaves_early_ends_the_command_in_silence(noid: Any, agent: Any) -> None:
    ended = threading.Event()

    def script(exchange: Any) -> None:
        exchange.request()
        try:
            while True:
                exchange.send(1, b"y\n" * 1000)
        except OSError:
            ended.set()

    agent.runs(script)
    done = noid.sh("noid exec web -- yes | head -1; echo ${PIPESTATUS[0]}")
    assert (done.stdout, done.stderr) == (b"y\n141\n", b"")
    assert ended.wait(PATIENCE_SECS)


@pytest.fixture
def unix_agent(noid: Any, agent: Any, tmp_path: Path) -> Iterator[Any]:
    """A scripted agent on a unix socket, which is what ``noid`` then uses."""
    with socket.socket(socket.AF_UNIX) as listener:
        path = tmp_path / "a.sock"
        listener.bind(str(path))
        listener.listen()
        scripted = type(agent)(listener)
        thread = threading.Thread(target=scripted.serve)
        thread.start()
        noid.env["NOID_URL"] = f"unix://{path}"
        yield scripted
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(PATIENCE_SECS)
    assert not scripted.problems


def test_over_a_unix_socket_it_is_all_the_same(noid: Any, unix_agent: Any) -> None:
    unix_agent.runs(echo)
    done = noid("exec", "web", "-i", "--", "cat", stdin=b"hello")
    assert (done.returncode, done.stdout) == (0, b"hello")


def fill(pipe: int, upto: int) -> int:
    """Write to *pipe* until nobody has read for a second or *upto* bytes are written; return how many."""
    os.set_blocking(pipe, False)
    written = 0
    while written < upto and select.select([], [pipe], [], 1.0)[1]:
        written += os.write(pipe, b"i" * 65536)
    return written


def test_input_the_guest_does_not_read_is_not_hoarded(noid: Any, unix_agent: Any) -> None:
    filled = threading.Event()

    def script(exchange: Any) -> None:
        exchange.request()
        assert filled.wait(PATIENCE_SECS)
        exchange.end(0)

    unix_agent.runs(script)
    with noid.start("exec", "web", "-i", "--", "x", stdin=subprocess.PIPE) as running:
        assert fill(running.stdin.fileno(), 32 << 20) < 4 << 20
        filled.set()
        assert running.wait(PATIENCE_SECS) == 0
        running.stdin.close()


def test_a_result_that_comes_as_the_agent_stops_reading_is_not_lost(noid: Any, unix_agent: Any) -> None:
    stuck, stopped, closed = threading.Event(), threading.Event(), threading.Event()

    def script(exchange: Any) -> None:
        exchange.request()
        assert stuck.wait(PATIENCE_SECS)
        assert stopped.wait(PATIENCE_SECS)
        exchange.end(5)
        exchange.sock.close()
        closed.set()

    unix_agent.runs(script)
    with noid.start("exec", "web", "-i", "--", "x", stdin=subprocess.PIPE) as running:
        fill(running.stdin.fileno(), 32 << 20)
        stuck.set()
        running.send_signal(signal.SIGSTOP)  # so that it sees the result and the broken pipe in the same moment
        os.waitid(os.P_PID, running.pid, os.WSTOPPED | os.WNOWAIT)
        stopped.set()
        assert closed.wait(PATIENCE_SECS)
        running.send_signal(signal.SIGCONT)
        assert running.wait(PATIENCE_SECS) == 5
        running.stdin.close()
