"""``noid wait`` and ``noid events``: commands that are there for what others do."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from noid.client.event_stream import Decoder, Event
from noid.testing.standing_server import StandingServer, standing_server

PATIENCE_SECS = 20.0
VM = {"name": "web", "state": "running", "cpus": 1, "mem_mib": 256, "created_at": "2026-01-02 03:04:05"}
STREAM = (
    "retry: 20\nid: a-1\n\n"
    'event: vm.create\nid: a-2\ndata: {"kind":"vm.create","vm":"w\u00e9b","at":"2026-01-02T03:04:05.678+00:00",'
    '"facts":{"state":"running","secs":1.25,"timings":{"x":1},"gone":null}}\n\n'
    ": nothing new\n\n"
    "event: gap\nid: a-9\ndata: {}\n\n"
).encode()


@pytest.fixture(scope="module")
def server(data_dir_root: Path) -> Iterator[StandingServer]:
    with standing_server(data_dir_root) as server:
        yield server


@pytest.fixture
def local(offline_noid: Any, server: StandingServer) -> Any:
    """The command line beside that server, with a VM ``web``."""
    offline_noid.env["NOID_URL"] = f"unix://{server.config.socket_path}"
    assert offline_noid("create", "web", "--mem", "256").returncode == 0
    yield offline_noid
    server.ask("DELETE", "/v1/vms/web", local=True)


# --- wait ------------------------------------------------------------------------------------------------------------


def test_wait_ends_when_the_vm_becomes_what_is_waited_for(local: Any) -> None:
    assert local("wait", "web", "--for", "running").stdout == b"VM 'web' is running\n"
    assert local("wait", "web", "--for", "exec", "-q").stdout == b"web\n"
    with local.start("wait", "--name", "web", "--for", "stopped", stdout=subprocess.PIPE) as running:
        with pytest.raises(subprocess.TimeoutExpired):
            running.wait(0.5)
        local("stop", "web", "--force")
        assert running.wait(PATIENCE_SECS) == 0
        assert running.stdout.read() == b"VM 'web' is stopped\n"
    done = local("wait", "web", "--for", "exec", "--timeout", "0.2")
    assert (done.returncode, done.stdout) == (124, b"")
    assert done.stderr.startswith(b"Error: it did not happen within 0.2 s")
    assert local("wait", "nope", "--for", "running").returncode == 125


def test_waiting_for_a_process_has_an_end_of_its_own(local: Any) -> None:
    process = local("exec", "web", "-dq", "--", "sleep", "600").stdout.decode().strip()
    assert local("wait", "web", process, "--timeout", "0.2").returncode == 124
    local("kill", "web", process)
    assert local("wait", "web", process, "--timeout", "20").returncode == 128 + signal.SIGTERM


def test_a_server_that_cannot_wait_is_asked_again(noid: Any, agent: Any) -> None:
    def answer(method: str, path: str) -> bytes:
        agent.answers(method, path, 200, VM if len(agent.requests) > 1 else VM | {"state": "dead"})
        return bytes(type(agent).answer_of(agent, method, path))

    agent.answer_of = answer
    assert noid("wait", "web", "--for", "running").returncode == 0
    assert [request.path for request in agent.requests] == ["/v1/vms/web"] * 2


def test_a_guest_that_does_not_answer_yet_is_waited_for_and_a_refusal_is_not(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/vms/web", 200, VM)

    def answer(method: str, path: str) -> bytes:
        if method == "POST":
            tries = sum(request.method == "POST" for request in agent.requests)
            ran = {"stdout": "", "exit_code": 127, "timed_out": False, "truncated": False}
            agent.answers(method, path, *((504, {"error": "silent", "code": "deadline"}) if tries < 2 else (200, ran)))
        return bytes(type(agent).answer_of(agent, method, path))

    agent.answer_of = answer
    assert noid("wait", "web", "--for", "exec").stdout == b"VM 'web' answers\n"
    agent.answer_of = lambda method, path: type(agent).answer_of(agent, method, path)
    agent.answers("POST", "/v1/vms/web/exec", 403, {"error": "your token does not allow that", "code": "scope"})
    assert noid("wait", "web", "--for", "exec").returncode == 125


def test_wait_needs_a_process_or_what_to_wait_for(noid: Any, agent: Any) -> None:
    for words in (("wait",), ("wait", "web", "p", "--for", "exec"), ("wait", "web", "--for", "ever")):
        assert noid(*words).returncode == 2
    assert agent.requests == []


# --- events ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_events_are_understood_however_they_are_cut(size: int) -> None:
    decoder, found = Decoder(), list[Event]()
    for start in range(0, len(STREAM), size):
        found += decoder.feed(STREAM[start : start + size])
    assert [(event.id, event.kind, event.vm) for event in found] == [
        ("a-2", "vm.create", "w\u00e9b"),
        ("a-9", "gap", None),
    ]
    assert (decoder.last_id, decoder.retry_secs) == ("a-9", 0.02)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"data: []\n\n", "another shape"),
        (b"data: <html>\n\n", "Expecting value"),
        (b"data: {}\n\n", "another shape"),
        (b"x" * (1 << 20) + b"y", "endless"),
    ],
)
def test_what_is_no_event_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Decoder().feed(data)


def test_what_happens_is_shown_as_it_happens_and_can_be_gone_back_to(local: Any, server: StandingServer) -> None:
    with local.start("events", "--vm", "web", "--json", stdout=subprocess.PIPE) as running:
        # Until it listens, something has to happen again and again.
        stopping = threading.Event()

        def change() -> None:
            number = 0
            while not stopping.is_set():
                number += 1
                server.ask("PATCH", "/v1/vms/web", {"labels": {"n": str(number)}}, local=True)

        changing = threading.Thread(target=change)
        changing.start()
        first = json.loads(running.stdout.readline())
        stopping.set()
        changing.join(PATIENCE_SECS)
        assert first["vm"] == "web"
        assert first["kind"] in ("operation.start", "operation.end", "vm.change")
        running.send_signal(signal.SIGINT)
        assert running.wait(PATIENCE_SECS) == 130

    later = local("events", "--since", first["id"], "--no-follow", "-q").stdout.decode().split()
    assert later
    assert first["id"] not in later
    everything = local("events", "--since", "1h", "--no-follow", "--vm", "web", "--kind", "vm.create")
    assert everything.stderr == b""
    assert b"  vm.create        web  operation=" in everything.stdout
    assert local("events", "--since", "0s", "--no-follow").stdout == b""


class Streams:
    """The agent's side of streams of events: what each connection is sent before it is closed."""

    def __init__(self, agent: Any, *answers: bytes) -> None:
        self._agent, self._answers = agent, list(answers)
        agent.answer_of = self.next

    def next(self, method: str, path: str) -> bytes:
        body = self._answers.pop(0)
        if body.startswith(b"HTTP"):
            return body
        head = b"HTTP/1.1 200 \r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        return head + b"%x\r\n%b\r\n" % (len(body), body)


def test_a_lost_stream_is_taken_up_behind_the_last_event_and_ends_with_its_token(noid: Any, agent: Any) -> None:
    last = b'event: vm.died\nid: a-10\ndata: {"kind":"vm.died","vm":"web","at":"2026-01-02T03:04:06+00:00","facts":{}}'
    after = b'event: vm.stop\nid: a-11\ndata: {"vm":"web","at":"2026-01-02T03:04:07+00:00","facts":{}}\n\n'
    refused = b'HTTP/1.1 401 \r\nContent-Length: 30\r\n\r\n{"error":"token","code":"x"}  '
    Streams(agent, STREAM, b"HTTP/1.1 503 \r\nContent-Length: 0\r\n\r\n", last + b"\n\nevent: vm.cre", after, refused)
    done = noid("events")
    assert done.stdout.decode() == (
        "2026-01-02 03:04:05  vm.create        w\u00e9b  state=running secs=1.250\n"
        "2026-01-02 03:04:06  vm.died          web\n"
        "2026-01-02 03:04:07  vm.stop          web\n"
    )
    assert [request.headers.get("last-event-id") for request in agent.requests] == [None, "a-9", "a-9", "a-10", "a-11"]
    errors = done.stderr.decode().splitlines()
    assert done.returncode == 1
    assert errors[0].startswith("Some events are missing here")
    assert [line for line in errors if "Trying again" in line] == errors[1:4]
    assert errors[-1].startswith("Error: server error (401)")


def test_a_stream_that_is_none_is_said_at_once(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/events", 200, [])
    done = noid("events")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"something noid-server would not" in done.stderr
    assert noid("events", "--since", "soon").returncode == 2
