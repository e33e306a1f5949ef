"""``noid port-forward`` and ``open``, through the server and the real agent, to servers that the tests are.

The guests are simulated, but their agent is the real one and runs on this host: a port of the guest is one of ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from noid.client.calls.ports import GuestPort, parse
from noid.client.forwarding import Forward, parse_forward
from noid.errors import DependencyDown, InvalidRequest
from noid.testing.guest_files import agent_program

from .conftest import PATIENCE_SECS, Noid

SERVER = """
import pathlib, sys, trio
from noid.core.opening import open_agent
from noid.server.serve import serve
from noid.testing.faults import Faults
from noid.testing.guest_files import plugins_with_files
from noid.testing.simulated_agent import give_default_image, simulated_config

data_dir, program = map(pathlib.Path, sys.argv[1:])
if not (data_dir / "noid.db").exists():
    give_default_image(data_dir)

async def main():
    config = simulated_config(data_dir)
    async with open_agent(config, plugins_with_files(Faults(), program)) as agent:
        await serve(agent, config, ready=lambda: print("ready", flush=True))

trio.run(main)
"""


class Server:
    """The server's process."""

    def __init__(self, data_dir: Path, program: Path) -> None:
        self.data_dir = data_dir
        self._program = program
        self._start()

    def _start(self) -> None:
        with (self.data_dir / "agent.log").open("ab") as log:
            argv = [sys.executable, "-c", SERVER, str(self.data_dir), str(self._program)]
            self._process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n", (self.data_dir / "agent.log").read_text()

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE_SECS)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def restart(self) -> None:
        self.stop()
        self._start()


@pytest.fixture(scope="module")
def server(data_dir_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    try:
        program = agent_program(tmp_path_factory.mktemp("agent"))
    except DependencyDown as error:
        pytest.skip(f"no guest agent: {error}")
    server = Server(Path(tempfile.mkdtemp(dir=data_dir_root)), program)
    env = {**os.environ, "NOID_DATA_DIR": str(server.data_dir)}

    def run(*arguments: str) -> None:
        subprocess.run([sys.executable, "-m", "noid.cli.main", *arguments], env=env, check=True, capture_output=True)

    try:
        run("create", "web", "--mem", "128")
        yield server
        run("destroy", "web")
    finally:
        server.stop()


@pytest.fixture
def noid(offline_noid: Noid, server: Server) -> Noid:
    offline_noid.env["NOID_DATA_DIR"] = str(server.data_dir)
    return offline_noid


Serving = Callable[[socket.socket], None]


@pytest.fixture
def serving() -> Iterator[Callable[[Serving], int]]:
    """Serve every connection to a port that is returned with a function, in a thread."""
    listeners: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def serve(function: Serving) -> int:
        listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        listeners.append(listener)

        def take() -> None:
            with contextlib.suppress(OSError):  # it is closed at the end
                while True:
                    accepted, _ = listener.accept()
                    accepted.settimeout(PATIENCE_SECS)
                    threads.append(threading.Thread(target=run, args=(accepted,)))
                    threads[-1].start()

        def run(accepted: socket.socket) -> None:
            with accepted:
                function(accepted)

        threads.append(threading.Thread(target=take))
        threads[-1].start()
        return int(listener.getsockname()[1])

    yield serve
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
    for thread in threads:
        thread.join(PATIENCE_SECS)
        assert not thread.is_alive()


class Forwarding:
    """A ``noid port-forward`` that runs."""

    def __init__(self, noid: Noid, *arguments: str) -> None:
        self.process = noid.start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline().decode()

    @property
    def port(self) -> int:
        return int(self.line.split(" -> ")[0].rpartition(":")[2])

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_SECS)

    def complaint(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.readline().decode()


@pytest.fixture
def forwarding(noid: Noid) -> Iterator[Callable[..., Forwarding]]:
    running: list[Forwarding] = []

    def start(*arguments: str) -> Forwarding:
        running.append(Forwarding(noid, *arguments))
        return running[-1]

    yield start
    for each in running:
        each.process.send_signal(signal.SIGINT)
        _, complaints = each.process.communicate(timeout=PATIENCE_SECS)
        assert each.process.returncode == 130, complaints
        assert b"Traceback" not in complaints


def everything(sock: socket.socket) -> bytes:
    received = bytearray()
    while data := sock.recv(65536):
        received += data
    return bytes(received)


def echo_after_the_end(sock: socket.socket) -> None:
    sock.sendall(everything(sock))


def test_each_side_can_end_before_the_other(
    forwarding: Callable[..., Forwarding], serving: Callable[[Serving], int]
) -> None:
    def first(sock: socket.socket) -> None:
        sock.sendall(b"bye")
        sock.shutdown(socket.SHUT_WR)
        heard.append(everything(sock))

    heard: list[bytes] = []
    sent = os.urandom(300_000)
    running = forwarding("port-forward", "web", f":{serving(echo_after_the_end)}")
    with running.connect() as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        assert everything(client) == sent

    running = forwarding("port-forward", "web", f":{serving(first)}")
    with running.connect() as client:
        assert everything(client) == b"bye"
        client.sendall(b"but listen")
        client.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            everything(client)
    for _ in range(1000):
        if heard:
            break
        threading.Event().wait(0.01)
    assert heard == [b"but listen"]


def test_what_breaks_is_reset_and_never_ends_in_order(
    forwarding: Callable[..., Forwarding], serving: Callable[[Serving], int]
) -> None:
    def breaks(sock: socket.socket) -> None:
        sock.sendall(b"half")
        sock.recv(1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def is_broken(sock: socket.socket) -> None:
        try:
            everything(sock)
        except ConnectionResetError:
            broken.set()

    broken = threading.Event()
    running = forwarding("port-forward", "web", f":{serving(breaks)}")
    with running.connect() as client:
        assert client.recv(4) == b"half"
        client.sendall(b"!")
        with pytest.raises(ConnectionResetError):
            everything(client)
    assert "in the guest broke" in running.complaint()

    running = forwarding("port-forward", "web", f":{serving(is_broken)}")
    with running.connect() as client:
        client.sendall(b"half an upl")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert broken.wait(PATIENCE_SECS)


def test_a_hundred_connections_at_once_and_one_where_nothing_listens(
    forwarding: Callable[..., Forwarding], serving: Callable[[Serving], int]
) -> None:
    running = forwarding("port-forward", "web", f":{serving(echo_after_the_end)}", ":1")
    clients = [running.connect() for _ in range(100)]
    for number, client in enumerate(clients):
        client.sendall(b"%d" % number)
        client.shutdown(socket.SHUT_WR)
    for number, client in enumerate(clients):
        with client:
            assert everything(client) == b"%d" % number

    assert running.process.stdout is not None
    lines = [running.process.stdout.readline().decode() for _ in range(2 if ":1" in running.line else 3)]
    nowhere = next(line for line in lines if line.endswith("-> 1\n"))
    port = int(nowhere.split(" -> ")[0].rpartition(":")[2])
    client = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECS)
    with client, pytest.raises(ConnectionResetError):
        client.recv(1)
    assert f":{port} -> 1: server error (502): nothing listens at localhost:1 in the guest" in running.complaint()
    with running.connect() as client:
        client.shutdown(socket.SHUT_WR)
        assert everything(client) == b""


def test_who_does_not_read_holds_back_the_server_and_nobody_else(
    forwarding: Callable[..., Forwarding], serving: Callable[[Serving], int]
) -> None:
    sent = 0

    def flood(sock: socket.socket) -> None:
        nonlocal sent
        sock.settimeout(0.4)
        with contextlib.suppress(OSError):
            while True:
                sent += sock.send(bytes(65536))

    running = forwarding("port-forward", "web", f":{serving(flood)}")
    other = forwarding("port-forward", "web", f":{serving(echo_after_the_end)}")
    with running.connect() as slow:
        assert slow.recv(1)
        with other.connect() as client:
            client.sendall(b"?")
            client.shutdown(socket.SHUT_WR)
            assert everything(client) == b"?"
        threading.Event().wait(0.7)  # the server gives up after a while in which nobody takes anything
    assert 0 < sent < 64 << 20


def test_a_server_that_is_restarted_leaves_the_port_open(
    forwarding: Callable[..., Forwarding], serving: Callable[[Serving], int], server: Server
) -> None:
    def welcome(sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock.sendall(b"welcome")
            sock.sendall(everything(sock))

    running = forwarding("port-forward", "web", f":{serving(welcome)}")
    with running.connect() as client:
        assert client.recv(7) == b"welcome"
        server.restart()
        with pytest.raises(ConnectionResetError):
            everything(client)
    assert "Error: " in running.complaint()
    with running.connect() as client:
        client.sendall(b"again")
        client.shutdown(socket.SHUT_WR)
        assert everything(client) == b"welcomeagain"


def test_stdio_is_one_connection(noid: Noid, serving: Callable[[Serving], int]) -> None:
    sent = os.urandom(200_000)
    done = noid("port-forward", "--stdio", "web", str(serving(echo_after_the_end)), stdin=sent)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == sent

    done = noid("port-forward", "--stdio", "web", "1")
    assert done.returncode == 1
    assert b"nothing listens at localhost:1" in done.stderr


def test_json_and_quiet_tell_what_is_listened_on(
    forwarding: Callable[..., Forwarding], noid: Noid, serving: Callable[[Serving], int]
) -> None:
    port = serving(echo_after_the_end)
    running = forwarding("port-forward", "web", f":{port}", "--json")
    told = json.loads(running.line)
    assert told == {
        "vm": "web", "address": "127.0.0.1", "port": told["port"], "remote_host": "localhost", "remote_port": port
    }  # fmt: skip
    assert forwarding("port-forward", "web", f":127.0.0.1:{port}", "-q", "--address", "127.0.0.2").line.startswith(
        "127.0.0.2:"
    )
    done = noid("port-forward", "web", f"{told['port']}:{port}")
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{told['port']}: something on this machine does already".encode() in done.stderr
    assert f"{told['port'] + 1}:{port}".encode() in done.stderr


def test_open_prints_a_url_that_leads_there(
    forwarding: Callable[..., Forwarding], noid: Noid, serving: Callable[[Serving], int]
) -> None:
    def hello(sock: socket.socket) -> None:
        sock.recv(1000)
        sock.sendall(b"HTTP/1.0 200 OK\r\n\r\nhello")

    port = serving(hello)
    running = forwarding("open", "web", str(port), "--json")
    told = json.loads(running.line)
    assert told["url"] == f"http://127.0.0.1:{told['port']}/"
    with socket.create_connection(("127.0.0.1", told["port"]), timeout=PATIENCE_SECS) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert everything(client).endswith(b"hello")
    done = noid("open", "web")
    assert done.returncode == 1
    assert b"nothing in VM 'web' listens on a port" in done.stderr


def test_what_cannot_be_is_said_at_once(noid: Noid) -> None:
    done = noid("port-forward", "nope", "80")
    assert done.returncode == 1
    assert b"VM 'nope' not found" in done.stderr
    for arguments in (("web",), (), ("web", "80", "--stdio", "81")):
        assert noid("port-forward", *arguments).returncode == 2
    for wrong in ("80x", "web.example:80", "1:2:3:4", "0", "8080:0", ":", "70000", "1:[::1:80"):
        assert noid("port-forward", "web", wrong).returncode == 1, wrong


@pytest.mark.parametrize(
    ("text", "forward"),
    [
        ("80", Forward(local_port=80, remote_port=80)),
        ("8080:80", Forward(local_port=8080, remote_port=80)),
        (":80", Forward(local_port=0, remote_port=80)),
        ("0:80", Forward(local_port=0, remote_port=80)),
        (":10.0.0.7:80", Forward(local_port=0, remote_port=80, remote_host="10.0.0.7")),
        ("8080:[::1]:80", Forward(local_port=8080, remote_port=80, remote_host="::1")),
        ("1:localhost:80", Forward(local_port=1, remote_port=80)),
    ],
)
def test_a_forward_is_written_as_everywhere(text: str, forward: Forward) -> None:
    assert parse_forward(text) == forward


def test_a_forward_to_a_name_says_that_names_are_not_looked_up() -> None:
    with pytest.raises(InvalidRequest, match="names are not looked up"):
        parse_forward("1:db.example:80")


def test_the_kernels_tables_say_who_listens_where() -> None:
    tables = """  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   2: 0F02000A:0035 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   3: 0100007F:9999 0100007F:0050 01 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
cat: can't open '/proc/net/tcp9': No such file or directory
   0: 00000000000000000000000000000000:0050 00000000000000000000000000000000:0000 0A 00000000:00000000 00:0 0 0 0 0
   1: 00000000000000000000000001000000:0BB8 00000000000000000000000000000000:0000 0A 00000000:00000000 00:0 0 0 0 0
   2: B80D0120000000000000000001000000:0051 00000000000000000000000000000000:0000 0A 00000000:00000000 00:0 0 0 0 0
   3: 0000000000000000FFFF00000F02000A:0052 00000000000000000000000000000000:0000 0A 00000000:00000000 00:0 0 0 0 0
"""
    assert parse(tables) == [
        GuestPort(port=53, host="10.0.2.15"),
        GuestPort(port=80),
        GuestPort(port=81, host="2001:db8::1"),
        GuestPort(port=82, host="10.0.2.15"),
        GuestPort(port=3000),
        GuestPort(port=8080),
    ]
