"""Whatever answers, and whatever it answers: one paragraph, soon, and nothing that a terminal would obey."""

from __future__ import annotations

import re
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from noid.cli import main

SOON_SECS = 10.0
"""Less than the silence that is waited for: what is seen to be wrong is said at once."""
NASTY = "\x1b]0;owned\x07\x1b[2J\x1b[31mx\x9b1m\r\x00\u202e"
ID = "0123456789abcdef"
VM = {
    "name": NASTY, "state": NASTY, "cpus": 1, "mem_mib": 512, "created_at": NASTY, "image": NASTY, "ended": NASTY,
    "how": NASTY, "labels": {NASTY: NASTY}, "timings": {NASTY: 1.0}, "unresponsive_since": NASTY, "generation": 1,
    "receipt": [{"name": NASTY, "status": "failed", "before": NASTY, "after": NASTY, "detail": NASTY}],
}  # fmt: skip
POINT = {"id": ID, "vm_name": NASTY, "label": NASTY, "created_at": NASTY, "labels": {NASTY: NASTY}}
PROCESS = {
    "id": NASTY, "pid": 1, "command": [NASTY], "state": NASTY, "exit_code": None, "origin": NASTY, "started_at": NASTY,
}  # fmt: skip


@contextmanager
def greeting(words: bytes) -> Iterator[str]:
    """Yield the URL of something that says *words* to who connects, or to whom has asked, and then waits."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                kept.append(sock)
                sock.sendall(words)

        kept: list[socket.socket] = []
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(SOON_SECS)
        for sock in kept:
            sock.close()


@pytest.mark.parametrize(
    "words",
    [b"SSH-2.0-OpenSSH_9.2\r\n", b"-ERR unknown command 'GET'\r\n", b"220 mail ESMTP\r\n", b"HTTP/2.0 200\r\n", b"\0"],
)
def test_another_protocol_is_recognised_at_once(noid: Any, words: bytes) -> None:
    began = time.monotonic()
    with greeting(words) as url:
        done = noid("--server", url, "list")
        assert done.stderr.decode() == f"Error: connection error: {url} does not speak HTTP. Is the port right?\n"
    assert time.monotonic() - began < SOON_SECS


def test_tls_where_http_is_expected_and_the_other_way_round_are_told(noid: Any) -> None:
    with greeting(b"\x15\x03\x01\x00\x02\x02\x16") as url:
        assert b"speaks TLS. Give noid its URL with https://" in noid("--server", url, "list").stderr
    with greeting(b"HTTP/1.1 400 Bad Request\r\n\r\n") as url:
        done = noid("--server", url.replace("http:", "https:"), "list")
    assert done.returncode == 1
    assert b"does not speak TLS. Is the port right, or is its URL one with http://?" in done.stderr


@pytest.mark.parametrize(
    "answer",
    [
        {},
        None,
        7,
        "text",
        [None],
        [[]],
        [{}],
        [{"name": 7, "state": "running", "cpus": 1, "mem_mib": 1, "created_at": "x"}],
        [{"name": "x", "state": "running", "cpus": True, "mem_mib": 1, "created_at": "x"}],
        [{"name": "x", "state": "running", "cpus": 1, "mem_mib": 1, "created_at": "x", "labels": ["a"]}],
        [{"name": "x", "state": "running", "cpus": 1, "mem_mib": 1, "created_at": "x", "receipt": [7]}],
    ],
)
def test_json_of_another_shape_is_no_answer_of_noid_server(
    noid: Any, agent: Any, answer: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    agent.answers("GET", "/v1/vms", 200, answer)
    for name, value in noid.env.items():
        monkeypatch.setenv(name, value)
    assert main.run(["list"]) == 1
    assert "something noid-server would not. Is the URL right" in capfd.readouterr().err


def test_json_that_never_stops_nesting_is_no_answer_either(noid: Any, agent: Any) -> None:
    for status in (200, 500):
        deep = b"[" * 100_000
        agent.answers_raw(b"HTTP/1.1 %d \r\nContent-Length: %d\r\n\r\n%b" % (status, len(deep), deep))
        done = noid("list")
        assert (done.returncode, b"bug" in done.stderr, done.stderr.count(b"\n")) == (1, False, 1)


COMMANDS: list[tuple[str, ...]] = [
    ("list",), ("list", "-q"), ("list", "--json"), ("list", "--timing"), ("info", "web"), ("create", "web", "--timing"),
    ("label", "web"), ("checkpoint", "web"), ("checkpoints", "web"), ("checkpoints", "--all"),
    ("restore", "web", ID, "--as", "copy"), ("rename", "web", "www"), ("ps", "web"), ("stop", "web"), ("whoami",),
    ("restore", "web", "0123", "--as", "copy"), ("operations",), ("quota",),
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("fails", [False, True], ids=["answers", "refuses"])
def test_no_escape_sequence_of_a_server_reaches_the_terminal(
    noid: Any,
    agent: Any,
    command: tuple[str, ...],
    fails: bool,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    operation = {"id": ID, "kind": NASTY, "vm": NASTY, "state": NASTY, "step": NASTY, "started_at": NASTY}
    answers: list[tuple[str, str, Any]] = [
        ("GET", "/v1/vms", [VM]), ("GET", "/v1/vms/web", VM), ("POST", "/v1/vms", VM), ("PATCH", "/v1/vms/web", VM),
        ("POST", "/v1/vms/web/checkpoints", POINT), ("GET", "/v1/vms/web/checkpoints", [POINT, POINT]),
        ("GET", "/v1/checkpoints", [POINT]), ("POST", "/v1/vms/web/restore", VM), ("POST", "/v1/vms/web/stop", VM),
        ("GET", "/v1/vms/web/processes", [PROCESS]),
        ("GET", "/v1/whoami", {"user_id": NASTY, "name": NASTY, "token": NASTY, "scopes": [NASTY]}),
        ("GET", "/v1/operations", [operation | {"ended_at": None, "error": {"error": NASTY, "code": NASTY}}]),
        ("GET", "/v1/quota", {"limits": {NASTY: 1}, "use": {NASTY: 1}}),
    ]  # fmt: skip
    for method, path, answer in answers:
        agent.answers(method, path, 400 if fails else 200, {"error": NASTY, "code": NASTY} if fails else answer)
    for name, value in noid.env.items():
        monkeypatch.setenv(name, value)
    code = main.run(list(command))
    sys.stdout.flush()
    shown = "".join(capfd.readouterr())
    assert shown
    assert (code != 0) >= fails
    assert "bug" not in shown
    assert shown.replace("\n", "").isprintable(), shown


def test_a_location_and_a_version_are_shown_harmless_too(noid: Any, agent: Any) -> None:
    for head in (b"302 \r\nLocation: http://x/\x1b[31m\x07", b"200 \r\nX-Noid-Api-Version: \x1b[31m", b"500 \r\nX: y"):
        agent.answers_raw(b"HTTP/1.1 " + head + b"\r\nContent-Length: 6\r\n\r\n\x1b[31m\x07")
        done = noid("list")
        assert done.returncode == 1
        assert re.fullmatch(rb"[^\x00-\x09\x0b-\x1f\x7f]+", done.stderr)


def test_a_process_log_that_is_called_strangely_and_its_error_do_no_harm(noid: Any, agent: Any) -> None:
    done = noid("logs", "web", NASTY.replace("\0", ""))
    assert done.returncode == 1
    assert done.stderr.decode().replace("\n", "").isprintable()


def test_what_the_network_does_to_a_command_is_noticed_by_the_kernel(noid: Any, agent: Any) -> None:
    """How long that takes is in these numbers: a minute at most. A network that is lost would take the test as long."""
    from noid.client.connecting import _keep_alive

    with socket.socket() as sock:
        _keep_alive(sock)
        idle, every, count, unanswered_ms = (
            sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"))
            for name in ("KEEPIDLE", "KEEPINTVL", "KEEPCNT", "USER_TIMEOUT")
        )
    assert sock.family == socket.AF_INET
    assert idle + every * count <= 60
    assert unanswered_ms <= 60_000


def test_input_without_end_takes_no_memory(noid: Any, agent: Any) -> None:
    """As much as a client could hold is given to a server that reads, and says so, only as fast as it likes."""
    size, limit = 256 << 20, 128 << 20
    heard = 0

    def script(exchange: Any) -> None:
        nonlocal heard
        assert exchange.request()["stdin"] is True
        exchange.send_json(process="8f0a12bc", lineage="0" * 12, pid=1, offset=0, stdin=0)
        while (message := exchange.receive()[1]) != b"\x03":
            heard += len(message) - 1
            exchange.send_json(stdin=heard)
        exchange.end(0)

    agent.runs(script)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    with (
        subprocess.Popen(["head", "-c", str(size), "/dev/zero"], stdout=subprocess.PIPE) as zeros,
        noid.start("exec", "web", "-i", "--", "cat", stdin=zeros.stdout) as running,
    ):
        assert zeros.stdout is not None
        zeros.stdout.close()
        assert running.wait(60) == 0
    assert heard == size
    assert max(before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1024 < max(limit, before * 1024 + 1)


def test_a_bug_says_that_it_is_one(
    noid: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise AttributeError("no such thing\x1b[2J")

    told: Callable[..., Any] = broken
    monkeypatch.setattr("noid.cli.account.set_active_vm", told)
    monkeypatch.delenv("NOID_VERBOSE", raising=False)
    assert main.run(["use", "web"]) == 1
    said = capfd.readouterr().err
    assert said.startswith("Error: this is a bug in noid")
    assert said.replace("\n", "").isprintable()
    monkeypatch.setenv("NOID_VERBOSE", "1")
    with pytest.raises(AttributeError):
        main.run(["use", "web"])
