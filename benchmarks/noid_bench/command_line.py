"""What the ``noid`` command takes beside Python doing nothing and a bare click program, each a process, in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

from noid.errors import BackendError
from noid_bench.http_load import Target, exchange, request_bytes
from noid_bench.http_server import reaped_directory, simulated_server
from noid_bench.report import Figure

TURNS = 5
"""How often everything runs for a sample: the sample is the median, which what else the machine does moves less."""

PYTHON = (sys.executable, "-c", "pass")
BARE_CLICK = (
    sys.executable,
    "-c",
    "import click\n"
    "@click.group()\n"
    "def cli(): pass\n"
    "@cli.command('list')\n"
    "def list_(): click.echo('No VMs found.')\n"
    "cli(['list'])",
)
_VM = {"name": "bench", "cpus": 1, "mem_mib": 128}
_PATIENCE_SECS = 60.0


def measure_command_line(rounds: int, parent: Path) -> list[Figure]:
    """Measure with *rounds* samples each, working below *parent*; nothing is left there."""
    with reaped_directory(parent) as directory, simulated_server(directory) as (token, server):
        environment = _environment(directory / "noid")
        _run((*_noid(), "create", "bench"), environment)
        _ask(server, request_bytes("POST", "/v1/vms", token, json.dumps(_VM).encode()))
        execute = request_bytes("POST", "/v1/vms/bench/exec", token, json.dumps({"command": ["true"]}).encode())
        whats: dict[str, Callable[[], float]] = {
            "python": lambda: _run(PYTHON, environment),
            "click": lambda: _run(BARE_CLICK, environment),
            "version": lambda: _run((*_noid(), "--version"), environment),
            "list": lambda: _run((*_noid(), "list"), environment),
            "exec": lambda: _run((*_noid(), "exec", "bench", "--", "true"), environment),
            "server": lambda: _ask(server, execute),
        }
        for what in whats.values():
            what()  # what is compiled is kept from now on, and files are in memory
        samples: dict[str, list[float]] = {name: [] for name in whats}
        for _ in range(rounds):
            turns = [{name: what() for name, what in whats.items()} for _ in range(TURNS)]
            for name, taken in samples.items():
                taken.append(1000 * median(turn[name] for turn in turns))
    return _figures({name: tuple(taken) for name, taken in samples.items()})


def _figures(samples: Mapping[str, tuple[float, ...]]) -> list[Figure]:
    beyond = tuple(whole - own for whole, own in zip(samples["exec"], samples["server"], strict=True))
    floor, floor_name = samples["python"], "python -c pass"
    return [
        Figure(name="a bare click program", unit="ms", samples=samples["click"], floor=floor, floor_name=floor_name),
        Figure(
            name="noid --version",
            unit="ms",
            samples=samples["version"],
            floor=floor,
            floor_name=floor_name,
            must=4.0,
            aim=3.0,
        ),
        Figure(
            name="noid list", unit="ms", samples=samples["list"], floor=floor, floor_name=floor_name, must=4.0, aim=3.5
        ),
        Figure(
            name="noid list, beside a bare click program",
            unit="ms",
            samples=samples["list"],
            floor=samples["click"],
            floor_name="the click program",
            must=1.5,
            aim=1.1,
        ),
        Figure(
            name="noid exec VM -- true, beyond the server",
            unit="ms",
            samples=beyond,
            must=120.0,
            aim=80.0,
            note=f"the server's own time: {median(samples['server']):.1f} ms",
        ),
    ]


def _noid() -> tuple[str, ...]:
    """Return how the command is started here: the way people do, where it is installed."""
    script = Path(sys.executable).with_name("noid")
    return (str(script),) if script.exists() else (sys.executable, "-m", "noid")


def _environment(data_dir: Path) -> dict[str, str]:
    """Return the environment of somebody whose own agent has *data_dir*, and whose Python keeps what it compiles."""
    dropped = {"NOID_URL", "NOID_SERVER", "NOID_TOKEN", "PYTHONDONTWRITEBYTECODE"}
    return {name: value for name, value in os.environ.items() if name not in dropped} | {"NOID_DATA_DIR": str(data_dir)}


def _run(argv: tuple[str, ...], environment: Mapping[str, str]) -> float:
    """Run *argv* and return how many seconds it took.

    Raises:
        BackendError: it failed.
    """
    started = time.perf_counter()
    done = subprocess.run(
        argv,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=_PATIENCE_SECS,
        check=False,
    )
    took = time.perf_counter() - started
    if done.returncode != 0:
        raise BackendError(f"{argv[-1]!r} of the bench failed: {done.stderr.decode('utf-8', 'replace').strip()}")
    return took


def _ask(server: Target, request: bytes) -> float:
    """Make *request* on a connection of its own, and return how many seconds the answer took."""
    with server.connect() as sock:
        started = time.perf_counter()
        head, answer = exchange(sock, request)
        took = time.perf_counter() - started
    if not head.startswith((b"HTTP/1.1 200", b"HTTP/1.1 201")):
        raise BackendError(f"the bench's server answered {answer!r}")
    return took
