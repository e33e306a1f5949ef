"""The raw floor on Firecracker: its API called by a plain script that knows nothing of noid but its files. Blocking."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from noid_vmm_firecracker.backend import BASE_NAME, DISK_NAME
from noid_vmm_firecracker.machine import AGENT_PORT, API_SOCKET, VSOCK_SOCKET

from noid.core.model.storage import Volume
from noid.errors import BackendError

CALL_SECS = 60.0
_LOOK_SECS = 0.001
_STARTS_WITHIN_SECS = 10.0

Answer = Callable[[socket.socket], None]
"""Asks the guest's agent something over its channel, and returns with its answer."""


class BareFirecracker:
    """One Firecracker process in *directory*. `prepare` what is not to be timed, then call `start`."""

    def __init__(self, program: str, directory: Path, answer: Answer) -> None:
        self.directory = directory
        self._program = program
        self._answer = answer
        self._process: subprocess.Popen[bytes] | None = None

    def prepare(self, volume: Volume) -> None:
        """Give the disks, which lie in `directory`, the names that are in the snapshot."""
        (self.directory / DISK_NAME).symlink_to(volume.path)
        if volume.base_path is not None:
            (self.directory / BASE_NAME).symlink_to(volume.base_path)

    def start(self, source: Path) -> float:
        """Continue the snapshot in *source* and wait for the guest's first answer. Return the seconds it took.

        Raises:
            BackendError: it failed; carries what Firecracker has said.
        """
        started = time.perf_counter()
        with (self.directory / "vmm.log").open("wb") as log:
            self._process = subprocess.Popen(
                [self._program, "--api-sock", API_SOCKET],
                cwd=self.directory,
                stdin=subprocess.PIPE,  # its serial line, on which nobody types
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._load(source)
            with connected(self.directory / VSOCK_SOCKET) as channel:
                channel.sendall(f"CONNECT {AGENT_PORT}\n".encode())
                while (byte := channel.recv(1)) != b"\n":
                    if not byte:
                        raise RuntimeError("the guest's agent does not listen")
                self._answer(channel)
        except (OSError, RuntimeError) as error:
            said = (self.directory / "vmm.log").read_text(errors="replace")[-2000:]
            raise BackendError(f"a bare Firecracker failed: {error}. It said: {said.strip()}") from error
        return time.perf_counter() - started

    def _load(self, source: Path) -> None:
        with _connected_at_last(self.directory / API_SOCKET) as api:
            wanted = {
                "snapshot_path": str(source / "state"),
                "mem_backend": {"backend_type": "File", "backend_path": str(source / "memory")},
                "track_dirty_pages": True,
                "resume_vm": True,
            }
            call(api, "PUT", "/snapshot/load", wanted)

    def end(self) -> None:
        """Kill it and remove its directory."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._process.stdin is not None:
                self._process.stdin.close()
        shutil.rmtree(self.directory, ignore_errors=True)


def connected(path: Path) -> socket.socket:
    """Return a connection to the unix socket *path*.

    Raises:
        OSError: nobody listens there.
    """
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(CALL_SECS)
    try:
        connection.connect(str(path))
    except OSError:
        connection.close()
        raise
    return connection


def call(api: socket.socket, method: str, path: str, content: Mapping[str, Any]) -> None:
    """Make one call that is answered with 204.

    Raises:
        RuntimeError: it was not.
    """
    body = json.dumps(content)
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    api.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    answer = b""
    while b"\r\n\r\n" not in answer:
        data = api.recv(65536)
        if not data:
            break
        answer += data
    if not answer.startswith(b"HTTP/1.1 204"):
        raise RuntimeError(f"{method} {path}: {answer.decode(errors='replace')}")


def _connected_at_last(path: Path) -> socket.socket:
    deadline = time.monotonic() + _STARTS_WITHIN_SECS
    while True:
        try:
            return connected(path)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_LOOK_SECS)
