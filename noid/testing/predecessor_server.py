"""The server of the predecessor, 0.2.31, as a client meets it: its routes, statuses, words and quirks, in a thread.

What it does to guests is done to processes here: a VM's commands run in a bash of their own, on this machine. The
quirks that a client has to live with:

- Unknown routes and wrong methods are 404 ``not found``; errors have no ``code``. A 101 has no version header.
- exec: output at the end and in one piece, stdout and stderr as one, without blanks at both ends. Output that does not
  end a line swallows the exit code, which is then null, and the marker is left at its end.
- An exec on a VM that is dead never ends. A console on a VM that is not there is a 101 and then nothing.
- Putting a VM back in place loses it and stops the server.
- DELETE of what is not there is 204; the checkpoints of a VM that is not there are ``[]``; they go with their VM.
- Fields it does not know are ignored: images, labels, users, directories, input.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import socket
import subprocess
import threading
import time
import uuid
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha1
from typing import Any

from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Message, Ping, TextMessage

from noid.testing.predecessor_exec import OUTPUT_BYTES_MAX, type_command

VERSION = "0.2.31"
PATIENCE_SECS = 20.0
EXEC_TIMEOUT_SECS = 30.0
BODY_BYTES_MAX = 1 << 20
HISTORY_BYTES = 512
CHUNKED_FROM_BYTES = 32768
_NAME = re.compile(r"(?![.-])(?!.*\.\.)[A-Za-z0-9_.-]{1,64}", re.ASCII)
_ENV = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=", re.ASCII)


class _Refused(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request as it came."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(slots=True)
class PredecessorServer:
    """One that runs. *asked* is what it was asked, in order; what tests change takes effect with the next request.

    Attributes:
        refuses_websockets: Whether all its sessions are taken: 503 before an upgrade.
        drops_output: Whether an exec's connection ends without a result, as when a proxy gives up.
        exec_timeout_secs: When a command is given up, which runs on.
    """

    listener: socket.socket
    token: str = field(default_factory=lambda: f"noid_tok_{secrets.token_hex(32)}")
    asked: list[Asked] = field(default_factory=list)
    problems: list[Exception] = field(default_factory=list)
    refuses_websockets: bool = False
    drops_output: bool = False
    exec_timeout_secs: float = EXEC_TIMEOUT_SECS
    vms: dict[str, dict[str, Any]] = field(default_factory=dict)
    checkpoints: dict[str, dict[str, Any]] = field(default_factory=dict)
    serial_logs: dict[str, bytearray] = field(default_factory=dict)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _deadlocked: bool = False
    _threads: list[threading.Thread] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    @property
    def user_id(self) -> str:
        """Who the token belongs to."""
        return str(uuid.uuid5(uuid.NAMESPACE_OID, self.token))

    def forget_everything(self) -> None:
        """Be as new."""
        for what in (self.asked, self.vms, self.checkpoints, self.serial_logs):
            what.clear()
        self.refuses_websockets = self.drops_output = False
        self.exec_timeout_secs = EXEC_TIMEOUT_SECS

    def has_vm(self, name: str, state: str = "running", *, created_at: str | None = None) -> None:
        """Let there be a VM."""
        self.vms[name] = {"name": name, "state": state, "cpus": 1, "mem_mib": 2048, "created_at": created_at or _now()}
        self.serial_logs[name] = bytearray(b"noid login: noid (automatic login)\r\nnoid@noid:~$ ")

    def has_checkpoint(
        self, vm: str, label: str | None = None, id_: str | None = None, *, created_at: str | None = None
    ) -> str:
        """Let there be a checkpoint, and return its id."""
        id_ = id_ or secrets.token_hex(8)
        self.checkpoints[id_] = {"id": id_, "vm_name": vm, "label": label, "created_at": created_at or _now()}
        return id_

    def serve(self) -> None:
        """Accept connections until the listener is shut down."""
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            sock.settimeout(PATIENCE_SECS)
            thread = threading.Thread(target=self._serve_one, args=(sock,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """End what hangs, as its process' end would."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(PATIENCE_SECS)

    def _serve_one(self, sock: socket.socket) -> None:
        with sock:
            try:
                while self._answer(sock):
                    pass
            except (BrokenPipeError, ConnectionResetError, TimeoutError):
                pass
            except Exception as problem:  # a mistake in the simulator: the test that uses it shall see it
                self.problems.append(problem)

    # --- HTTP --------------------------------------------------------------------------------------------------------

    def _answer(self, sock: socket.socket) -> bool:
        """Answer one request, and return whether another may follow."""
        data = b""
        while b"\r\n\r\n" not in data:
            more = sock.recv(65536)
            if not more:
                return False
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, path, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        while len(body) < int(headers.get("content-length", 0)):
            body += sock.recv(65536)
        asked = Asked(method=method, path=path, headers=headers, body=body[:BODY_BYTES_MAX])
        self.asked.append(asked)
        try:
            if headers.get("upgrade", "").lower() == "websocket":
                self._upgrade(sock, asked)
                return False
            status, answer = self._routed(asked)
        except _Refused as refused:
            status, answer = refused.status, {"error": str(refused)}
        if self._deadlocked and path != "/version":
            self._stopping.wait()
            return False
        sock.sendall(_response(status, answer))
        return headers.get("connection", "").lower() != "close"

    def _authenticate(self, asked: Asked) -> None:
        scheme, _, token = asked.headers.get("authorization", "").partition(" ")
        if scheme != "Bearer" or not token:
            raise _Refused(401, "missing or invalid Authorization header")
        if token != self.token:
            raise _Refused(401, "invalid token")

    def _routed(self, asked: Asked) -> tuple[int, Any]:
        if (asked.method, asked.path) == ("GET", "/healthz"):
            return 200, {"status": "ok"}
        if (asked.method, asked.path) == ("GET", "/version"):
            return 200, {"version": VERSION, "api_version": 1}
        self._authenticate(asked)
        path = asked.path.partition("?")[0]
        match asked.method, path:
            case "GET", "/v1/whoami":
                return 200, {"user_id": self.user_id, "name": "alice"}
            case "GET", "/v1/capabilities":
                return 200, {"api_version": 1, "max_exec_output_bytes": OUTPUT_BYTES_MAX}
            case "GET", "/v1/vms":
                return 200, list(self.vms.values())
            case "POST", "/v1/vms":
                return 201, self._create(_fields(asked.body))
        if not path.startswith("/v1/vms/"):
            raise _Refused(404, "not found")
        name, _, rest = path.removeprefix("/v1/vms/").partition("/")
        if not name:
            raise _Refused(400, "missing VM name in path")
        if not _NAME.fullmatch(name):
            raise _Refused(400, "invalid VM name")
        return self._of_vm(asked, name, rest)

    def _of_vm(self, asked: Asked, name: str, rest: str) -> tuple[int, Any]:
        match asked.method, rest:
            case "GET", "":
                return 200, self._vm(name)
            case "DELETE", "":
                self._forget(name)
                return 204, None
            case "POST", "exec":
                output, result = self._run(name, _fields(asked.body))
                return 200, {"stdout": output, **result}
            case "GET", "exec" | "console":
                raise _Refused(426, "WebSocket upgrade required")
            case "POST", "checkpoints":
                self._vm(name)
                try:
                    label = _fields(asked.body).get("label")
                except _Refused:
                    label = None
                return 201, self.checkpoints[self.has_checkpoint(name, label)]
            case "GET", "checkpoints":
                return 200, [each for each in self.checkpoints.values() if each["vm_name"] == name]
            case "POST", "restore":
                return 200, self._restore(name, _fields(asked.body))
        raise _Refused(404, "not found")

    def _vm(self, name: str) -> dict[str, Any]:
        if name not in self.vms:
            raise _Refused(404, f"VM '{name}' not found")
        return self.vms[name]

    def _create(self, fields: dict[str, Any]) -> dict[str, Any]:
        name, cpus, mem_mib = fields.get("name"), fields.get("cpus", 1), fields.get("mem_mib", 2048)
        if not isinstance(name, str):
            raise _Refused(400, "invalid request body: missing field `name` at line 1 column 2")
        if type(cpus) is not int or type(mem_mib) is not int or cpus < 0 or mem_mib < 0:
            raise _Refused(400, "invalid request body: invalid type, expected u32 at line 1 column 9")
        if not _NAME.fullmatch(name):
            raise _Refused(500, f"VM name contains invalid characters: '{name}'")
        if name in self.vms:
            raise _Refused(409, f"VM '{name}' already exists")
        if not 1 <= cpus <= 32:
            raise _Refused(500, "failed to set machine config")
        self.has_vm(name)
        self.vms[name] |= {"cpus": cpus, "mem_mib": mem_mib}
        return self.vms[name]

    def _forget(self, name: str) -> None:
        self.vms.pop(name, None)
        for id_ in [id_ for id_, each in self.checkpoints.items() if each["vm_name"] == name]:
            del self.checkpoints[id_]

    def _restore(self, name: str, fields: dict[str, Any]) -> dict[str, Any]:
        id_, new_name = fields.get("checkpoint_id"), fields.get("new_name")
        if not isinstance(id_, str):
            raise _Refused(400, "invalid request body: missing field `checkpoint_id` at line 1 column 2")
        if id_ not in self.checkpoints:
            raise _Refused(404, f"checkpoint '{id_}' not found")
        if new_name is None:
            self.vms.get(name, {})["state"] = "dead"
            self._deadlocked = True
            return {}
        if not _NAME.fullmatch(new_name):
            raise _Refused(500, f"VM name contains invalid characters: '{new_name}'")
        if new_name in self.vms:
            raise _Refused(409, f"VM '{new_name}' already exists")
        self.has_vm(new_name)
        return self.vms[new_name]

    # --- exec --------------------------------------------------------------------------------------------------------

    def _run(self, name: str, fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Return what a command wrote, and how it ended."""
        command, env = fields.get("command"), fields.get("env", [])
        if not isinstance(command, list) or not all(isinstance(word, str) for word in command):
            raise _Refused(400, "invalid exec request: missing field `command` at line 1 column 2")
        if not isinstance(fields.get("tty", False), bool):
            raise _Refused(400, "invalid exec request: invalid type, expected a boolean at line 1 column 2")
        if not command:
            raise _Refused(400, "command cannot be empty")
        if len(env) > 64:
            raise _Refused(400, "too many environment variables (max 64)")
        for entry in env:
            if not _ENV.match(entry):
                raise _Refused(400, f"invalid environment variable '{entry}': expected KEY=VALUE")
        if self._vm(name)["state"] != "running":
            self._stopping.wait()  # nobody reads the other end of the serial line
        return type_command(command, env, self.exec_timeout_secs)

    # --- WebSockets --------------------------------------------------------------------------------------------------

    def _upgrade(self, sock: socket.socket, asked: Asked) -> None:
        self._authenticate(asked)
        found = re.fullmatch(r"/v1/vms/([^/]+)/(.+)", asked.path.partition("?")[0])
        if found is None:
            raise _Refused(404, "not found")
        if self.refuses_websockets:
            raise _Refused(503, "too many WebSocket sessions")
        key = asked.headers["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = b64encode(sha1(key.encode(), usedforsecurity=False).digest()).decode()
        lines = ["HTTP/1.1 101 Switching Protocols", "Server: tiny-http (Rust)", "Date: Wed, 18 Feb 2026 00:00:00 GMT"]
        lines += ["Connection: upgrade", "Upgrade: websocket", f"Sec-WebSocket-Accept: {accept}", "", ""]
        sock.sendall("\r\n".join(lines).encode())
        session: Callable[[_Session, str], None] | None = {"exec": self._exec, "console": self._console}.get(found[2])
        if session is not None:
            session(_Session(sock), found[1])

    def _exec(self, session: _Session, name: str) -> None:
        first = session.receive()
        if not isinstance(first, str):
            session.close()
            return
        try:
            output, result = self._run(name, _fields(first.encode(), "invalid exec request"))
        except _Refused as refused:
            session.send(json.dumps({"error": str(refused)}))
            session.close()
            return
        if self.drops_output:
            return
        if output:
            session.send(b"\x01" + output.encode())
        session.send(json.dumps(result))
        session.close()

    def _console(self, session: _Session, name: str) -> None:
        if name not in self.vms:
            return
        log = self.serial_logs[name]
        session.send(b"\x01" + bytes(log[-HISTORY_BYTES:]))
        line = bytearray()
        while not self._stopping.is_set():
            message = session.receive()
            if message is None:
                return
            if isinstance(message, str) or message[:1] != b"\x03":
                continue
            typed = message[1:]
            line += typed
            shown = typed.replace(b"\r", b"\r\n")
            line = bytearray(line.replace(b"\n", b"\r"))  # both are Enter at a prompt
            while b"\r" in line:
                command, _, rest = line.partition(b"\r")
                line = bytearray(rest)
                done = subprocess.run(["bash", "-c", bytes(command)], capture_output=True, check=False)
                shown += done.stdout.replace(b"\n", b"\r\n") + b"noid@noid:~$ "
            log += shown
            session.send(b"\x01" + shown)


class _Session:
    """A WebSocket, the server's side of it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._ws = Connection(ConnectionType.SERVER)
        self._parts: list[Any] = []

    def receive(self) -> str | bytes | None:
        """Return the next message, or None at the end."""
        while True:
            for event in self._ws.events():
                match event:
                    case TextMessage() | BytesMessage():
                        self._parts.append(event.data)
                        if event.message_finished:
                            parts, self._parts = self._parts, []
                            return "".join(parts) if isinstance(event, TextMessage) else b"".join(map(bytes, parts))
                    case Ping():
                        self._sock.sendall(self._ws.send(event.response()))
                    case CloseConnection():
                        return None
            data = self._sock.recv(65536)
            if not data:
                return None
            self._ws.receive_data(data)

    def send(self, message: str | bytes) -> None:
        """Send *message*."""
        event: Message[Any] = TextMessage(data=message) if isinstance(message, str) else BytesMessage(data=message)
        self._sock.sendall(self._ws.send(event))

    def close(self) -> None:
        """Send an empty close frame. The connection is dropped right after it."""
        self._sock.sendall(b"\x88\x00")


@contextlib.contextmanager
def predecessor_server() -> Iterator[PredecessorServer]:
    """Run one for the block.

    Raises:
        AssertionError: something went wrong in it.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = PredecessorServer(listener)
        thread = threading.Thread(target=server.serve, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            server.stop()
            thread.join(PATIENCE_SECS)
    if server.problems:
        raise AssertionError("the server's side went wrong") from server.problems[0]


def _fields(body: bytes, what: str = "invalid request body") -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except ValueError as error:
        raise _Refused(400, f"{what}: {error}") from error
    if not isinstance(fields, dict):
        raise _Refused(400, f"{what}: invalid type, expected a map at line 1 column 0")
    return fields


def _response(status: int, answer: Any) -> bytes:
    body = b"" if answer is None else json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()
    lines = [f"HTTP/1.1 {status} ", "Server: tiny-http (Rust)", "Date: Wed, 18 Feb 2026 00:00:00 GMT"]
    lines.append("X-Noid-Api-Version: 1")
    if answer is not None:
        lines.append("Content-Type: application/json")
    if len(body) >= CHUNKED_FROM_BYTES:
        lines.append("Transfer-Encoding: chunked")
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    else:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
