"""The process that passes for Firecracker: its command line, its API socket, and what shall go wrong in it.

It is what `noid.testing.firecracker` writes a starter for, which hands over a directory of its own: ``setup.json``
says which version this is, ``faults/`` what goes wrong, ``calls`` is what it was asked. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from noid.testing.firecracker_api import Api

BODY_BYTES_MAX = 51_200
_READ_BYTES = 65536
_FOR_EVER_SECS = 1e6
_METHODS = (b"GET", b"PUT", b"PATCH", b"DELETE")
_REQUEST = re.compile(rb"([A-Z]+) (\S+) HTTP/1\.[01]\r\n")
_LENGTH = re.compile(rb"^content-length:\s*(\d+)\r?$", re.IGNORECASE | re.MULTILINE)


class Trouble:
    """What was armed and has not happened yet. A file is one fault; whoever renames it is the one it strikes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def take(self, call: str) -> dict[str, Any] | None:
        """Return the fault that strikes this *call*, if there is one, and have it happen only once."""
        with (self._directory / "calls").open("a") as log:
            log.write(f"{call}\n")
        for path in sorted((self._directory / "faults").glob("*.armed")):
            fault: dict[str, Any] = json.loads(path.read_text())
            if fault["call"] == call and fault["nth"] > 1:
                path.write_text(json.dumps(fault | {"nth": fault["nth"] - 1}))
            elif fault["call"] == call:
                path.rename(path.with_suffix(".struck"))
                return fault
        return None


class Server:
    """The API socket: one request after the other on each connection, in the loop that also drives the guest."""

    def __init__(self, path: str, api: Api, trouble: Trouble, selector: selectors.BaseSelector) -> None:
        self._api = api
        self._trouble = trouble
        self._selector = selector
        self._hangs = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        self._listener.listen(8)
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _accept(self, listener: socket.socket) -> None:
        connection = listener.accept()[0]
        received = bytearray()

        def on_data(_: socket.socket) -> None:
            goes_on = False
            with contextlib.suppress(ConnectionError):  # who asked has gone away before the answer
                data = connection.recv(_READ_BYTES)
                received.extend(data)
                goes_on = bool(data) and self._serve(connection, received)
            if not goes_on:
                self._selector.unregister(connection)
                connection.close()

        self._selector.register(connection, selectors.EVENT_READ, on_data)

    def _serve(self, connection: socket.socket, received: bytearray) -> bool:
        """Answer the requests that are complete; return whether the connection goes on."""
        while (end := received.find(b"\r\n\r\n")) >= 0 and not self._hangs:
            head = bytes(received[: end + 2])
            request = _REQUEST.match(head)
            if request is None or request[1] not in _METHODS:
                connection.sendall(_http_error("Invalid HTTP Method: Unsupported HTTP method."))
                return False
            length = _LENGTH.search(head)
            size = int(length[1]) if length else 0
            if size > BODY_BYTES_MAX:
                text = (
                    f"Request payload with size {size} is larger than the limit of {BODY_BYTES_MAX} allowed by server."
                )
                connection.sendall(_http_error(text))
                return False
            if len(received) < end + 4 + size:
                return True
            body = bytes(received[end + 4 : end + 4 + size]) if length else None
            del received[: end + 4 + size]
            if not self._answer(connection, request[1].decode(), request[2].decode(), body):
                return False
        return True

    def _answer(self, connection: socket.socket, method: str, path: str, body: bytes | None) -> bool:
        fault = self._trouble.take(f"{method} {path}") or {"what": "", "when": ""}
        what, before = str(fault["what"]), fault["when"] == "before"
        if what == "refuse":
            connection.sendall(_answer(400, {"fault_message": fault["text"]}))
            return True
        if what == "garble":
            connection.sendall(_http_error(fault["text"]))
            return True
        if before and not self._strike(fault):
            return what != "cut"
        interrupt = (lambda: self._strike(fault)) if fault["when"] == "during" else None
        status, content = self._api.handle(method, path, body, interrupt)
        if what == "late" and fault["when"] == "after":
            time.sleep(fault["secs"])
        if fault["when"] == "after" and not self._strike(fault):
            return what != "cut"
        connection.sendall(_answer(status, content))
        if self._api.exit_status is not None:
            sys.exit(self._api.exit_status)
        return True

    def _strike(self, fault: dict[str, Any]) -> bool:
        """Let it happen; return whether the request goes on."""
        what = fault["what"]
        if fault["when"] == "during" and what in ("hang", "late"):  # the guest stands still meanwhile
            time.sleep(fault["secs"] if what == "late" else _FOR_EVER_SECS)
        if what in ("die", "kill"):
            os.kill(fault["pid"] if what == "kill" else os.getpid(), signal.SIGKILL)
        self._hangs = self._hangs or what == "hang"
        return what not in ("hang", "cut")


def _answer(status: int, content: Any) -> bytes:
    head = f"HTTP/1.1 {status} \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n"
    if content is None:
        return f"{head}\r\n".encode()
    body = json.dumps(content, separators=(",", ":"))
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


def _http_error(text: str) -> bytes:
    """Return what Firecracker says of a request it cannot read: with a raw line break in what should be JSON."""
    body = f'{{ "error": "{text}\nAll previous unanswered requests will be dropped." }}'
    head = "HTTP/1.1 400 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


def _options(arguments: list[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    words = iter(arguments)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if name in ("version", "no-api", "enable-pci"):
            options[name] = ""
        elif name in ("api-sock", "id", "log-path", "level", "config-file"):
            options[name] = value if equals else next(words)
        else:
            sys.exit(f"Arguments parsing error: Found argument '{name}' which wasn't expected")
    return options


def _configured(api: Api, path: str) -> None:
    """Do what a configuration file says, and start."""
    config: dict[str, Any] = json.loads(Path(path).read_bytes())
    calls = [("machine-config", config["machine-config"]), ("boot-source", config["boot-source"])]
    calls += [(f"drives/{drive['drive_id']}", drive) for drive in config["drives"]]
    calls.append(("actions", {"action_type": "InstanceStart"}))
    for name, content in calls:
        status, answer = api.handle("PUT", f"/{name}", json.dumps(content).encode(), None)
        if status >= 300:
            sys.exit(f"Building VMM configured from cmdline json failed: {answer['fault_message']}")


def main() -> None:
    """Run as the directory in the first argument says, with the others for Firecracker."""
    directory, arguments = Path(sys.argv[1]), sys.argv[2:]
    setup = json.loads((directory / "setup.json").read_text())
    options = _options(arguments)
    if "version" in options:
        print(f"Firecracker v{setup['version']}\n")  # noqa: T201  # this is a program
        return
    trouble = Trouble(directory)
    fault = trouble.take("start")
    if fault is not None and fault["what"] in ("die", "kill"):
        os.kill(fault["pid"] if fault["what"] == "kill" else os.getpid(), signal.SIGKILL)
    if fault is not None and fault["what"] == "hang":
        signal.pause()
    selector = selectors.DefaultSelector()
    api = Api(
        version=setup["version"], kvm=setup["kvm"], name=options.get("id", "anonymous-instance"), selector=selector
    )
    if "log-path" in options:
        Path(options["log-path"]).touch(0o600)
    if "config-file" in options:
        _configured(api, options["config-file"])
    else:
        try:
            Server(options["api-sock"], api, trouble, selector)
        except OSError as error:
            print(f"RunWithApiError: Failed to open the API socket at {options['api-sock']}: {error}", file=sys.stderr)  # noqa: T201
            sys.exit(1)
    while True:
        if api.machine is not None:
            api.machine.turn()
        else:
            for key, _ in selector.select():
                key.data(key.fileobj)
