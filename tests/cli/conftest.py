"""A scripted agent on a real socket, and the ``noid`` command as a real process beside it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, TextMessage

from noid.testing.person import Person

ROOT = Path(__file__).parents[2]
PATIENCE_SECS = 20.0
TOKEN = "noid_tok_" + "ab" * 32


_VERSION = b'HTTP/1.1 200 \r\nContent-Length: 36\r\n\r\n{"version":"0.3.0","api_version":1} '


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Exchange:
    """The agent's side of one exec stream."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.ws = Connection(ConnectionType.SERVER)
        self._queue: list[tuple[str, Any]] = []
        self._text = ""
        self._binary = b""

    def receive(self) -> tuple[str, Any]:
        """The next ('text', str), ('binary', bytes), ('close', code) or ('gone', None)."""
        while not self._queue:
            try:
                data = self.sock.recv(65536)
            except ConnectionResetError:
                data = b""
            if not data:
                return "gone", None
            self.ws.receive_data(data)
            for event in self.ws.events():
                match event:
                    case TextMessage(data=part, message_finished=done):
                        self._text += part
                        if done:
                            self._queue.append(("text", self._text))
                            self._text = ""
                    case BytesMessage(data=part, message_finished=done):
                        self._binary += bytes(part)
                        if done:
                            self._queue.append(("binary", self._binary))
                            self._binary = b""
                    case CloseConnection(code=code):
                        self._queue.append(("close", code))
        return self._queue.pop(0)

    def request(self) -> Any:
        kind, text = self.receive()
        assert kind == "text"
        return json.loads(text)

    def send(self, channel: int, data: bytes) -> None:
        self.sock.sendall(self.ws.send(BytesMessage(data=bytes((channel,)) + data)))

    def send_json(self, **fields: Any) -> None:
        self.sock.sendall(self.ws.send(TextMessage(data=json.dumps(fields))))

    def end(self, exit_code: int | None = 0, **fields: Any) -> None:
        self.send_json(**({"exit_code": exit_code, "timed_out": False, "truncated": False} | fields))
        if self.ws.state is ConnectionState.OPEN:
            self.sock.sendall(self.ws.send(CloseConnection(code=1000)))


@dataclass
class ScriptedAgent:
    """Answers what it was told to, to one connection after the other, and remembers what it was asked."""

    listener: socket.socket
    requests: list[Request] = field(default_factory=list)
    problems: list[BaseException] = field(default_factory=list)
    _answers: dict[tuple[str, str], bytes] = field(default_factory=dict)
    _exec: Callable[[Exchange], None] | None = None
    _raw: bytes | None = None
    _refused: set[str] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def answers(self, method: str, path: str, status: int, body: Any = None, **headers: str) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        fields = {"X-Noid-Api-Version": "1", "Content-Type": "application/json", "Content-Length": str(len(content))}
        fields |= {name.replace("_", "-"): value for name, value in headers.items()}
        head = f"HTTP/1.1 {status} \r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items()) + "\r\n"
        self._answers[method, path] = head.encode() + content

    def answers_raw(self, data: bytes) -> None:
        """Send *data* to whatever is asked and close."""
        self._raw = data

    def runs(self, script: Callable[[Exchange], None]) -> None:
        """Let *script* play the agent's part in every exec."""
        self._exec = script

    def refuses(self, path: str) -> None:
        """Answer a WebSocket to *path* as what it `answers` to GET."""
        self._refused.add(path)

    def serve(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            sock.settimeout(PATIENCE_SECS)
            if sock.family == socket.AF_INET:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as every real agent's are
            with sock:
                try:
                    self._answer(sock)
                except (BrokenPipeError, ConnectionResetError):
                    pass
                except BaseException as error:
                    self.problems.append(error)

    def _answer(self, sock: socket.socket) -> None:
        data = b""
        while b"\r\n\r\n" not in data:
            more = sock.recv(65536)
            if not more:
                return
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        method, path, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        while len(body) < int(headers.get("content-length", 0)):
            body += sock.recv(65536)
        if path == "/version" and ("GET", path) not in self._answers and self._raw is None:
            sock.sendall(_VERSION)  # which nobody who writes a script wants to know
            return
        self.requests.append(Request(method, path, headers, body))
        if self._raw is not None:
            sock.sendall(self._raw)
        elif headers.get("upgrade") == "websocket" and self._exec is not None and path not in self._refused:
            key = headers["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
            accept = base64.b64encode(hashlib.sha1(key.encode(), usedforsecurity=False).digest()).decode()
            lines = ["HTTP/1.1 101 ", "Upgrade: websocket", "Connection: upgrade", f"Sec-WebSocket-Accept: {accept}"]
            lines.append("X-Noid-Api-Version: 1")
            sock.sendall("\r\n".join([*lines, "", ""]).encode())
            self._exec(Exchange(sock))
        else:
            sock.sendall(self.answer_of(method, path))

    def answer_of(self, method: str, path: str) -> bytes:
        unknown = b'HTTP/1.1 404 \r\nContent-Length: 21\r\n\r\n{"error":"not found"}'
        whole = re.sub(r"[?&]limit=1000$", "", path)  # who answers with a list in one page need not say so
        return self._answers.get((method, path)) or self._answers.get((method, whole), unknown)


@contextmanager
def _serving(listener: socket.socket) -> Iterator[ScriptedAgent]:
    scripted = ScriptedAgent(listener)
    thread = threading.Thread(target=scripted.serve)
    thread.start()
    try:
        yield scripted
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(PATIENCE_SECS)
    assert not thread.is_alive()
    assert not scripted.problems


@pytest.fixture
def agent() -> Iterator[ScriptedAgent]:
    with socket.create_server(("127.0.0.1", 0)) as listener, _serving(listener) as scripted:
        yield scripted


@pytest.fixture
def own_agent(offline_noid: Noid, data_dir: Path) -> Iterator[ScriptedAgent]:
    """A scripted agent where ``offline_noid`` finds its user's own."""
    offline_noid.env["NOID_DATA_DIR"] = str(data_dir)
    (data_dir / "run").mkdir(mode=0o700, parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(data_dir / "run" / "agent.sock"))
        listener.listen()
        with _serving(listener) as scripted:
            yield scripted


@dataclass
class Noid:
    """The command line: a home, a working directory, an environment."""

    home: Path
    cwd: Path
    env: dict[str, str]

    def __call__(self, *args: str | bytes, stdin: bytes = b"", **env: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            self.argv(*args),
            input=stdin,
            capture_output=True,
            cwd=self.cwd,
            env=self.env | env,
            timeout=PATIENCE_SECS,
            check=False,
        )

    def start(self, *args: str, **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.argv(*args), cwd=self.cwd, env=self.env, **options)

    @property
    def environment(self) -> dict[str, str]:
        """What the person's shell has exported."""
        return self.env

    def sh(self, script: str) -> subprocess.CompletedProcess[bytes]:
        """Run *script* by bash with ``noid`` in its path: no function, which would be a shell between the two."""
        program = self.home / "bin" / "noid"
        if not program.exists():
            program.parent.mkdir()
            program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m noid.cli.main "$@"\n')
            program.chmod(0o755)
        return subprocess.run(
            ["bash", "-c", script],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            cwd=self.cwd,
            env=self.env | {"PATH": f"{program.parent}{os.pathsep}{self.env['PATH']}"},
            timeout=PATIENCE_SECS,
            check=False,
        )

    @staticmethod
    def argv(*args: str | bytes) -> list[str | bytes]:
        return [sys.executable, "-m", "noid.cli.main", *args]


@pytest.fixture
def offline_noid(tmp_path: Path) -> Noid:
    """The command line of a new user: nothing configured."""
    home, cwd = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    cwd.mkdir()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return Noid(
        home,
        cwd,
        {
            "HOME": str(home),
            "PATH": os.environ["PATH"],
            "PYTHONPATH": path,
            "LANG": "C.UTF-8",
            "TERM": "noid-test",
            "NO_COLOR": "1",
        },
    )


@pytest.fixture
def noid(offline_noid: Noid, agent: ScriptedAgent) -> Noid:
    """The command line of somebody who uses the scripted agent."""
    offline_noid.env |= {"NOID_URL": agent.url, "NOID_TOKEN": TOKEN}
    return offline_noid


@pytest.fixture
def person() -> Callable[..., Person]:
    """Put somebody in front of a terminal in which the command runs with the arguments given."""
    return Person.typing
