"""Sockets: for this user only, never taken from a server that lives, never left to a child, given back at the end."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from noid.errors import ConfigError
from noid.server.listening import split_address, tcp_listeners, unix_listener
from noid.testing.processes import marked_processes

Server = Any  # see conftest.py


@pytest.fixture
def path(data_dir: Path) -> Path:
    return data_dir / "run" / "agent.sock"


# --- L: the unix socket ----------------------------------------------------------------------------------------------


def test_l_socket_and_directory_are_this_users_only(path: Path) -> None:
    with unix_listener(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert [entry.name for entry in path.parent.iterdir()] == ["agent.sock"]
    assert list(path.parent.iterdir()) == []


def test_l_the_socket_of_a_living_server_is_refused_and_stays(path: Path) -> None:
    with unix_listener(path) as sock:
        with (
            pytest.raises(ConfigError, match=r"another agent is serving .*agent\.sock. Stop it first"),
            unix_listener(path),
        ):
            pass
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            sock.accept()[0].close()


def test_l_a_busy_server_is_a_living_one(path: Path) -> None:
    with unix_listener(path) as sock:
        sock.listen(0)
        with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
            for client in (first, second):
                client.setblocking(False)
                client.connect_ex(str(path))
            with pytest.raises(ConfigError, match="another agent is serving"), unix_listener(path):
                pass


def test_l_the_socket_of_a_dead_server_is_replaced(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.is_socket()
    with unix_listener(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_l_a_socket_that_is_somebody_elses_by_now_is_left_alone(path: Path) -> None:
    with unix_listener(path):
        path.unlink()
        path.write_text("the next server's")
    assert path.read_text() == "the next server's"


def test_a_path_too_long_for_a_socket_is_said(data_dir: Path) -> None:
    with pytest.raises(ConfigError, match="cannot listen on"), unix_listener(data_dir / ("x" * 100) / "agent.sock"):
        pass


# --- TCP -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listen", "expected"),
    [("127.0.0.1:7654", ("127.0.0.1", 7654)), ("[::1]:1", ("::1", 1)), ("host:0", ("host", 0)), (":80", ("", 80))],
)
def test_an_address_is_host_and_port(listen: str, expected: tuple[str, int]) -> None:
    assert split_address(listen) == expected


@pytest.mark.parametrize(
    "listen", ["", "7654", "host:", "host:-1", "host:65536", "host:x", "host:٣", "::1:80", "host:1 "]
)
def test_what_is_no_address_is_said(listen: str) -> None:
    with pytest.raises(ConfigError, match=r"^listen = "):
        split_address(listen)


def test_a_port_in_use_is_said_and_what_to_do() -> None:
    with (
        tcp_listeners("127.0.0.1:0") as [sock],
        pytest.raises(ConfigError, match=r"cannot listen on .*: Address already in use\. Stop what is using the port"),
        tcp_listeners(f"127.0.0.1:{sock.getsockname()[1]}"),
    ):
        pass


def test_an_address_of_no_interface_is_said() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1:0"), tcp_listeners("192.0.2.1:0"):
        pass


def test_what_is_accepted_sends_small_answers_at_once() -> None:
    with tcp_listeners("127.0.0.1:0") as [sock], socket.create_connection(sock.getsockname()):
        sock.setblocking(True)
        accepted, _ = sock.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


# --- M: children -----------------------------------------------------------------------------------------------------


def sockets_of(pid: int) -> set[str]:
    """Return the inodes of the sockets a process holds."""
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the descriptor of this very listing
            found.add(str(entry.readlink()))
    return {link for link in found if link.startswith("socket:")}


async def test_m_no_child_inherits_a_socket_that_listens_or_serves(server: Server) -> None:
    await (await server.tcp()).ask("GET", "/healthz")
    await (await server.unix()).ask("GET", "/healthz")
    ours = sockets_of(os.getpid())
    assert len(ours) >= 6  # two listen, two serve, two are the clients'
    async with trio.open_nursery() as nursery:
        child = await nursery.start(partial(trio.run_process, ["cat"], stdin=subprocess.PIPE, close_fds=False))
        inherited = sockets_of(child.pid) & ours
        await child.stdin.aclose()
    assert inherited == set()


async def test_m_no_vmm_holds_a_socket_of_the_server(server: Server) -> None:
    await (await server.tcp()).ask("GET", "/healthz")
    await server.create()
    [vmm] = marked_processes(server.config.data_dir)
    assert sockets_of(vmm) & sockets_of(os.getpid()) == set()


# --- the end ---------------------------------------------------------------------------------------------------------


async def test_a_request_in_flight_is_answered_while_nobody_new_comes_in(server: Server) -> None:
    go_on = trio.Event()
    await server.create()
    server.faults.arm("capture", lambda _: go_on.wait())
    client = await server.unix()
    await client.send("POST", "/v1/vms/web/checkpoints")
    await server.faults.reached("capture")
    idle = await server.tcp()
    await idle.ask("GET", "/healthz")

    server.stopping.set()
    assert await idle.until_closed() == b""
    go_on.set()
    assert (await client.receive("POST")).status == 201
    await server.stopped.wait()
    assert not server.config.socket_path.exists()
    with pytest.raises(OSError, match="all attempts to connect"):
        await server.tcp()


async def test_an_operation_nobody_waits_for_any_more_is_finished_all_the_same(server: Server) -> None:
    go_on = trio.Event()
    server.faults.arm("launch", lambda _: go_on.wait())
    client = await server.unix()
    await client.send("POST", "/v1/vms", {"name": "web", "cpus": 1, "mem_mib": 128})
    await server.faults.reached("launch")
    server.stopping.set()
    await server.stopped.wait()  # the request's grace of one second is over
    go_on.set()
    user = server.agent.local_user()
    while (vm := server.agent.vm(user, "web")).busy:  # noqa: ASYNC110  # no event tells
        await trio.sleep(0.01)
    assert vm.state == "running"
