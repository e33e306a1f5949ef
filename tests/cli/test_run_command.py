"""``noid run``: a command in a VM of its own. Whatever ends it, the VM is gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from noid.core.images import Images
from noid.core.layout import Layout
from noid.testing.simulated_image import add_simulated_image
from noid.testing.standing_server import StandingServer, standing_server

PATIENCE_SECS = 20.0
VM = {"name": "web", "state": "running", "cpus": 1, "mem_mib": 256, "created_at": "2026-01-02 03:04:05"}


@pytest.fixture(scope="module")
def server(data_dir_root: Path) -> Iterator[StandingServer]:
    """A server with an image that boots at once and one, ``slow``, that takes longer than anybody waits."""
    with standing_server(data_dir_root) as server:
        scratch = server.config.data_dir / "slow"
        scratch.mkdir()
        images = Images(Layout(server.config.data_dir).images, {})
        add_simulated_image(images, scratch, "slow", cmdline="simulated.boot_secs=3600")
        yield server


@pytest.fixture
def local(offline_noid: Any, server: StandingServer) -> Any:
    """The command line beside that server. Afterwards there must be no VM."""
    offline_noid.env["NOID_URL"] = f"unix://{server.config.socket_path}"
    yield offline_noid
    left = json.loads(server.ask("GET", "/v1/vms", local=True).body)
    for vm in left:
        server.ask("DELETE", f"/v1/vms/{vm['name']}", local=True)
    assert left == []


def started(noid: Any, server: StandingServer, *arguments: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Start ``noid run`` and wait until its VM is there, or begun."""
    running = noid.start("run", *arguments, **options)
    deadline = time.monotonic() + PATIENCE_SECS
    while not (vms := json.loads(server.ask("GET", "/v1/vms", local=True).body)):
        assert time.monotonic() < deadline
        assert running.poll() is None
    return running, vms[0]


def test_a_command_runs_in_a_vm_of_its_own_and_its_exit_code_is_ours(local: Any) -> None:
    done = local("run", "--mem", "256", "--", "sh", "-c", "echo err >&2; exit 7")
    assert (done.returncode, done.stderr) == (7, b"err\n")
    assert b"X=1" in local("run", "--mem", "256", "-e", "X=1", "--", "env").stdout.splitlines()
    assert local("run", "--mem", "256", "--", "cat", stdin=b"from a pipe").stdout == b"from a pipe"
    assert local("run", "--mem", "256", "--", "no-such-program").returncode == 127
    assert local("run", "--mem", "256", "--timeout", "0.1", "--", "sleep", "60").returncode == 124
    assert local("run", "--mem", "256", "-u", "nobody-like-that", "--", "true").returncode == 125
    assert local("run", "--image", "no-such-image", "--", "true").returncode == 125
    assert local("run", "--mem", "256").returncode == 2


def test_a_kept_vm_is_named_and_a_taken_name_is_left_alone(local: Any) -> None:
    done = local("run", "--mem", "256", "--keep", "--name", "web", "--", "true")
    assert (done.returncode, done.stdout) == (0, b"")
    assert done.stderr == b"VM 'web' is kept. Remove it with: noid destroy web\n"
    assert local("run", "--mem", "256", "--name", "web", "--", "true").returncode == 125
    assert local("list", "-q").stdout == b"web\n"
    assert local("list", "-q", "--label", "noid.run").stdout == b""
    assert local("destroy", "web").returncode == 0


def test_a_vm_woken_from_a_checkpoint_goes_too(local: Any) -> None:
    local("create", "web", "--mem", "256")
    local("exec", "web", "--", "sh", "-c", "echo frozen > /root/file")
    local("checkpoint", "web", "--label", "golden")
    local("destroy", "web")
    assert local("run", "--from", "golden", "--", "cat", "/root/file").stdout == b"frozen\n"
    assert local("rm", "golden").returncode == 0


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ((signal.SIGINT,), 130),
        ((signal.SIGTERM,), 143),
        ((signal.SIGHUP,), 129),
        ((signal.SIGHUP, signal.SIGTERM), None),  # as a session's end sends both; which of them counts is open
        ((signal.SIGINT, signal.SIGINT), 130),
    ],
)
def test_signals_end_the_command_and_the_vm(
    local: Any, server: StandingServer, signals: tuple[signal.Signals, ...], code: int | None
) -> None:
    with local.start(
        "run", "--mem", "256", "--", "sh", "-c", "echo begun; sleep 600", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        assert running.stdout.readline() == b"begun\n"
        [vm] = json.loads(server.ask("GET", "/v1/vms?label=noid.run", local=True).body)
        assert vm["state"] == "running"
        for signo in signals:
            running.send_signal(signo)
        assert running.wait(PATIENCE_SECS) in ((code,) if code else (129, 143))


@pytest.mark.parametrize("signo", [signal.SIGINT, signal.SIGTERM])
def test_a_create_that_is_interrupted_is_undone(local: Any, server: StandingServer, signo: signal.Signals) -> None:
    running, vm = started(local, server, "--image", "slow", "--", "true", stderr=subprocess.PIPE)
    with running:
        assert vm["state"] == "creating"
        running.send_signal(signo)
        assert running.wait(PATIENCE_SECS) == 128 + signo
        assert b"may still be there" not in running.stderr.read()


def test_a_terminal_that_is_lost_takes_the_vm_with_it(local: Any, server: StandingServer, person: Any) -> None:
    with person(local, "run", "--mem", "256", "-it", "--", "sh", "-c", "echo begun; sleep 600") as someone:
        someone.sees(b"begun\r\n")
        os.close(someone.terminal)
        someone.terminal = os.open(os.devnull, os.O_RDWR)
        someone.running.send_signal(signal.SIGHUP)  # a terminal without a session leader tells nobody by itself
        assert someone.running.wait(PATIENCE_SECS) != 0


def test_who_leaves_a_command_running_keeps_its_vm(local: Any, server: StandingServer, person: Any) -> None:
    with person(local, "run", "--mem", "256", "--name", "web", "-it", "--", "sh", "-c", "echo begun; sleep 600") as one:
        one.sees(b"begun\r\n")
        one.types(b"\x10\x11")
        one.sees(b"Go back with: noid attach web ")
        one.sees(b"VM 'web' is kept. Remove it with: noid destroy web")
        assert one.running.wait(PATIENCE_SECS) == 0
    assert local("list", "-q", "--label", "noid.run").stdout == b"web\n"
    assert local("destroy", "web").returncode == 0


def test_what_nobody_reads_any_more_ends_with_its_vm(local: Any) -> None:
    done = local.sh("noid run --mem 256 -- yes | head -1")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"y\n", b"")


# --- where the server does not play along ----------------------------------------------------------------------------


def test_a_destroy_that_fails_is_repeated_and_then_named(noid: Any, agent: Any) -> None:
    agent.answers("POST", "/v1/vms", 201, VM)
    agent.runs(lambda exchange: (exchange.request(), exchange.end(3)))
    destroyed = threading.Event()

    def answer(method: str, path: str) -> bytes:
        if method == "DELETE":
            tries = sum(request.method == "DELETE" for request in agent.requests)
            agent.answers(method, path, *((409, {"error": "busy", "code": "busy"}) if tries < 3 else (204, None)))
            if tries == 3:
                destroyed.set()
        return bytes(type(agent).answer_of(agent, method, path))

    agent.answer_of = answer
    done = noid("run", "--name", "web", "--", "true")
    assert (done.returncode, done.stderr) == (3, b"")
    assert destroyed.is_set()

    agent.answer_of = lambda method, path: type(agent).answer_of(agent, method, path)
    agent.answers("DELETE", "/v1/vms/web", 403, {"error": "your token does not allow that", "code": "scope"})
    done = noid("run", "--name", "web", "--", "true")
    assert done.returncode == 3
    assert done.stderr.count(b"\n") == 1
    assert b"VM 'web' may still be there" in done.stderr
    assert b"Remove it with: noid destroy web" in done.stderr


@pytest.mark.parametrize(
    ("labels", "says"), [({"noid.run": "another"}, b""), ({}, b""), (None, b"nobody knows whether it was made")]
)
def test_a_vm_of_that_name_which_this_did_not_make_is_not_removed(
    noid: Any, agent: Any, labels: dict[str, str] | None, says: bytes
) -> None:
    agent.answers("GET", "/v1/vms/web", 200, VM if labels is None else VM | {"labels": labels})
    agent.answers("POST", "/v1/vms", 502, None)  # a proxy that has lost its server
    done = noid("run", "--name", "web", "--", "true")
    assert done.returncode == 125
    assert says in done.stderr
    assert not any(request.method == "DELETE" for request in agent.requests)


def test_a_vm_whose_create_had_no_answer_is_removed_if_it_is_ours(noid: Any, agent: Any) -> None:
    agent.answers("POST", "/v1/vms", 502, None)
    agent.answers("DELETE", "/v1/vms/web", 204)

    def answer(method: str, path: str) -> bytes:
        if method == "GET":
            agent.answers(method, path, 200, VM | {"labels": agent.requests[0].json["labels"]})
        return bytes(type(agent).answer_of(agent, method, path))

    agent.answer_of = answer
    assert noid("run", "--name", "web", "--", "true").returncode == 125
    assert [(request.method, request.path) for request in agent.requests] == [
        ("POST", "/v1/vms"),
        ("GET", "/v1/vms/web"),
        ("DELETE", "/v1/vms/web"),
    ]
