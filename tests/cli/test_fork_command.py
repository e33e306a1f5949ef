"""``noid fork``: copies of a VM from one instant of it, their names, and what is left when some cannot be made."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from noid.testing.standing_server import StandingServer, standing_server

PATIENCE_SECS = 20.0
VM = {"name": "web", "state": "running", "cpus": 1, "mem_mib": 256, "created_at": "2026-01-02 03:04:05"}
TAKEN = {"id": "0123456789abcdef", "vm_name": "web", "label": None, "created_at": "2026-01-02 03:04:05"}


@pytest.fixture(scope="module")
def server(data_dir_root: Path) -> Iterator[StandingServer]:
    with standing_server(data_dir_root) as server:
        yield server


@pytest.fixture
def local(offline_noid: Any, server: StandingServer) -> Any:
    """The command line beside that server, with a VM ``web``. Afterwards all VMs go, and there is no checkpoint."""
    offline_noid.env["NOID_URL"] = f"unix://{server.config.socket_path}"
    assert offline_noid("create", "web", "--mem", "256").returncode == 0
    yield offline_noid
    for vm in json.loads(server.ask("GET", "/v1/vms", local=True).body):
        server.ask("DELETE", f"/v1/vms/{vm['name']}", local=True)
    assert json.loads(server.ask("GET", "/v1/checkpoints", local=True).body) == []


def test_copies_continue_from_one_instant_and_take_the_numbers_that_are_free(local: Any) -> None:
    local("exec", "web", "--", "sh", "-c", "echo there > /root/file")
    local("create", "web-2", "--mem", "256")
    done = local("fork", "web", "3", "--label", "tier=front")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == "".join(f"VM 'web-{n}' forked from 'web'\n" for n in (1, 3, 4))
    assert local("list", "-q", "--label", "tier=front").stdout.split() != []
    for name in ("web-1", "web-3", "web-4"):
        assert local("exec", name, "--", "cat", "/root/file").stdout == b"there\n"
    origins = {vm["origin"] for vm in json.loads(local("list", "--json", "--label", "tier").stdout)}
    assert len(origins) == 1


def test_one_copy_has_just_the_name_it_is_given_and_several_have_numbers(local: Any) -> None:
    local("use", "web")
    assert local("fork", "--as", "copy").stdout == b"VM 'copy' forked from 'web'\n"
    assert local("fork", "2", "--as", "w", "-q").stdout == b"w-1\nw-2\n"
    done = local("fork", "--as", "copy")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"Error: VM 'copy': ")
    assert b"already exists" in done.stderr


def test_a_checkpoint_is_kept_that_shall_be(local: Any) -> None:
    told = json.loads(local("fork", "web", "--keep-checkpoint", "--json").stdout)
    kept = told["checkpoint"]["id"]
    assert [vm["name"] for vm in told["vms"]] == ["web-1"]
    assert told["vms"][0]["origin"] == kept
    assert (told["source"], told["failed"]) == ("web", [])
    assert local("checkpoints", "-q").stdout.decode() == f"{kept}\n"
    assert local("rm", kept).returncode == 0


@pytest.mark.parametrize("words", [("web", "0"), ("web", "x"), ("web", "1001"), ("web", "2", "3"), ("web", "²")])
def test_what_is_no_number_of_copies_changes_nothing(noid: Any, agent: Any, words: tuple[str, ...]) -> None:
    assert noid("fork", *words).returncode == 2
    assert agent.requests == []


def test_what_could_not_be_made_is_said_beside_what_was(noid: Any, agent: Any) -> None:
    agent.answers("GET", "/v1/vms", 200, [VM])
    agent.answers("POST", "/v1/vms/web/checkpoints", 201, TAKEN)
    agent.answers("DELETE", f"/v1/vms/web/checkpoints/{TAKEN['id']}", 409, {"error": "busy", "code": "busy"})

    def answer(method: str, path: str) -> bytes:
        if path == "/v1/vms/web/restore":
            name = agent.requests[-1].json["new_name"]
            if name == "web-2":
                agent.answers(method, path, 403, {"error": "you may have 2 VMs", "code": "quota"})
            else:
                agent.answers(method, path, 200, VM | {"name": name})
        return bytes(type(agent).answer_of(agent, method, path))

    agent.answer_of = answer
    done = noid("fork", "web", "3")
    assert done.returncode == 1
    assert done.stdout == b"VM 'web-1' forked from 'web'\nVM 'web-3' forked from 'web'\n"
    lines = done.stderr.decode().splitlines()
    assert lines[0] == "Error: VM 'web-2': server error (403): you may have 2 VMs"
    assert lines[1].startswith("warning: checkpoint 0123456789abcdef is left: ")
    assert lines[1].endswith("Remove it with: noid rm 0123456789abcdef")
    [taken] = [request for request in agent.requests if request.path == "/v1/vms/web/checkpoints"]
    assert set(taken.json["labels"]) == {"noid.fork"}


@pytest.mark.parametrize("signo", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_no_checkpoint_and_says_what_was_made(
    noid: Any, agent: Any, signo: signal.Signals
) -> None:
    agent.answers("GET", "/v1/vms", 200, [VM])
    agent.answers("POST", "/v1/vms/web/checkpoints", 201, TAKEN)
    agent.answers("DELETE", f"/v1/vms/web/checkpoints/{TAKEN['id']}", 204)
    restoring, interrupted = threading.Event(), threading.Event()

    def answer(method: str, path: str) -> bytes:
        if path == "/v1/vms/web/restore":
            restoring.set()
            assert interrupted.wait(PATIENCE_SECS)
            agent.answers(method, path, 200, VM | {"name": agent.requests[-1].json["new_name"]})
        return bytes(type(agent).answer_of(agent, method, path))

    agent.answer_of = answer
    with noid.start("fork", "web", "100", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert restoring.wait(PATIENCE_SECS)
        running.send_signal(signo)
        running.send_signal(signo)
        with pytest.raises(subprocess.TimeoutExpired):
            running.wait(0.3)
        interrupted.set()
        assert running.wait(PATIENCE_SECS) == 128 + signo
        assert b"VM 'web-1' forked from 'web'\n" in running.stdout.read()
    made = [request for request in agent.requests if request.path == "/v1/vms/web/restore"]
    assert len(made) < 100
    assert agent.requests[-1].method == "DELETE"
