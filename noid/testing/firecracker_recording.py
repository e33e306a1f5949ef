"""Asks a Firecracker what it answers: ``python -m noid.testing.firecracker_recording PROGRAM FILE`` keeps it.

A scene is one process and what it is asked in a row; each request goes over a connection of its own. No scene needs a
guest that runs, so the recording can be made, and compared, where KVM does not work.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_ANSWER_SECS = 10.0

_DISK = {"drive_id": "disk", "path_on_host": "disk", "is_root_device": True, "is_read_only": False}
_LOAD = {"snapshot_path": "state", "mem_backend": {"backend_type": "File", "backend_path": "memory"}}
_START = ("PUT", "/actions", {"action_type": "InstanceStart"})
#: By name: the files there are, and the requests. A body that is text is sent as it is.
SCENES: dict[str, tuple[dict[str, bytes], list[tuple[str, str, Any]]]] = {
    "before the start": (
        {"kernel": b"junk" * 1000, "initrd": b"", "disk": bytes(4096)},
        [
            ("GET", "/", None),
            ("GET", "/version", None),
            ("GET", "/machine-config", None),
            ("GET", "/nothing", None),
            ("PATCH", "/vm", {"state": "Paused"}),
            ("PATCH", "/vm", {"state": "Gone"}),
            ("PUT", "/snapshot/create", {"snapshot_type": "Diff", "snapshot_path": "s", "mem_file_path": "m"}),
            ("PUT", "/actions", {"action_type": "SendCtrlAltDel"}),
            ("PUT", "/actions", {"action_type": "Nonsense"}),
            _START,
            ("PUT", "/machine-config", None),
            ("PUT", "/machine-config", "{"),
            ("PUT", "/machine-config", {"vcpu_count": 1}),
            ("PUT", "/machine-config", {"vcpu_count": 0, "mem_size_mib": 128}),
            ("PUT", "/machine-config", {"vcpu_count": 33, "mem_size_mib": 128}),
            ("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 0}),
            ("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 128, "nonsense": 1}),
            ("PUT", "/machine-config", {"vcpu_count": 2, "mem_size_mib": 256, "smt": False, "track_dirty_pages": True}),
            ("GET", "/machine-config", None),
            ("PUT", "/boot-source", {"kernel_image_path": "missing", "boot_args": "quiet"}),
            ("PUT", "/boot-source", {"kernel_image_path": "kernel", "initrd_path": "missing", "boot_args": "quiet"}),
            ("PUT", "/boot-source", {"kernel_image_path": "kernel", "boot_args": "x" * 2100}),
            ("PUT", "/boot-source", {"kernel_image_path": "kernel", "initrd_path": "initrd", "boot_args": "quiet"}),
            ("PUT", "/drives/disk", _DISK | {"path_on_host": "missing"}),
            ("PUT", "/drives/disk", _DISK | {"drive_id": "other"}),
            ("PUT", "/drives/disk", _DISK | {"cache_type": "Writeback"}),
            ("PUT", "/vsock", {"guest_cid": 3, "uds_path": "no/v.sock"}),
            ("PUT", "/vsock", {"guest_cid": 3, "uds_path": "v.sock"}),
            ("PUT", "/entropy", {}),
            ("PUT", "/balloon", {"amount_mib": 0, "deflate_on_oom": True}),
            ("PUT", "/snapshot/load", _LOAD),
            ("PUT", "/snapshot/load", _LOAD | {"nonsense": True}),
            ("PUT", "/snapshot/load", {"snapshot_path": "state"}),
            ("PUT", "/snapshot/nonsense", {"snapshot_path": "state"}),
            ("DELETE", "/vsock", None),
            ("POST", "/vsock", {}),
            ("PUT", "/vsock", "x" * 51_300),
            _START,
            ("GET", "/", None),
        ],
    ),
    "a vsock that is there already": (
        {"v.sock": b""},
        [("PUT", "/vsock", {"guest_cid": 3, "uds_path": "v.sock"}), ("GET", "/", None)],
    ),
    "a snapshot that is not there": ({}, [("PUT", "/snapshot/load", _LOAD)]),
    "a snapshot that is empty": ({"state": b"", "memory": b""}, [("PUT", "/snapshot/load", _LOAD)]),
    "a snapshot that is none": ({"state": b"x" * 100, "memory": b""}, [("PUT", "/snapshot/load", _LOAD)]),
    "a body that is no JSON": ({}, [("PUT", "/snapshot/load", "{"), ("GET", "/", None)]),
}


def play(program: str, scene: str) -> list[Any]:
    """Return the answers of *program* in *scene*, as text, and at the end the exit status or ``runs``."""
    files, requests = SCENES[scene]
    with tempfile.TemporaryDirectory(prefix="noid-fc-") as name:
        directory = Path(name)
        for file, content in files.items():
            (directory / file).write_bytes(content)
        argv = [program, "--id", "scene", "--api-sock", "api.sock", "--log-path", str(directory / "log")]
        process = subprocess.Popen(argv, cwd=directory, stdin=subprocess.DEVNULL)
        try:
            _await_socket(directory / "api.sock", process)
            answers: list[Any] = [_ask(directory / "api.sock", *request) for request in requests]
            answers.append(_ending(process))
        finally:
            process.kill()
            process.wait()
    return answers


def _await_socket(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _ANSWER_SECS
    while time.monotonic() < deadline:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except OSError:
                assert process.poll() is None, f"it ended with {process.returncode}"
                time.sleep(0.005)
                continue
            return
    raise AssertionError("it does not listen")


def _ask(path: Path, method: str, target: str, content: Any) -> str:
    head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
    body = content if isinstance(content, str) else "" if content is None else json.dumps(content)
    if content is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_ANSWER_SECS)
        connection.connect(str(path))
        connection.sendall(f"{head}\r\n{body}".encode())
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += connection.recv(4096)
        length = [line for line in answer.split(b"\r\n") if line.lower().startswith(b"content-length:")]
        wanted = answer.index(b"\r\n\r\n") + 4 + (int(length[0].split(b":")[1]) if length else 0)
        while len(answer) < wanted:
            answer += connection.recv(4096)
        return answer[:wanted].decode()


def _ending(process: subprocess.Popen[bytes]) -> str | int:
    try:
        return process.wait(0.5)
    except subprocess.TimeoutExpired:
        return "runs"


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps({scene: play(sys.argv[1], scene) for scene in SCENES}, indent=1) + "\n")
