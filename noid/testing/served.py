"""``noid-server serve`` as a process of its own, on simulated VMs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

PATIENCE_SECS = 30.0
PROGRAM = """
import pathlib, sys
from noid.core import plugins
from noid.server import command
from noid.testing.simulated_agent import simulated_plugins

plugins.Plugins = simulated_plugins  # what is installed, and simulated VMs
sys.argv[0] = "noid-server"
command.main()
"""
SIMULATED = """
[backends]
vmm = "simulated"
exec = ["simulated"]
storage = "copy"
network = "none"
"""


class Served:
    """``noid-server serve`` on simulated VMs, as a process."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, *args: str, **environment: str) -> subprocess.Popen[str]:
        """Start it and wait until it is ready or has ended."""
        reading, writing = os.pipe()
        command = [sys.executable, "-c", PROGRAM, "serve", "--data-dir", str(self.data_dir), "--ready-fd", str(writing)]
        process = subprocess.Popen(
            [*command, *args],
            pass_fds=[writing],
            stderr=subprocess.PIPE,
            text=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, **environment},
        )
        os.close(writing)
        self.processes.append(process)
        with os.fdopen(reading) as pipe:
            self.said = pipe.read()  # until it is closed: it says one thing only
        return process

    def end(self, process: subprocess.Popen[str]) -> str:
        """Wait for its end and return what it wrote to stderr."""
        assert process.stderr is not None
        return process.communicate(timeout=PATIENCE_SECS)[1]

    def ask(self, request: bytes) -> bytes:
        """Return the start of the answer to *request*, over the unix socket."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE_SECS)
            sock.connect(str(self.data_dir / "run" / "agent.sock"))
            sock.sendall(request)
            return sock.recv(65536)
