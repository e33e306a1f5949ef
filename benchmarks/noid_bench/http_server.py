"""What a request costs: noid's server beside the least that could answer the same bytes, in turn, in the same run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from noid.errors import BackendError
from noid.testing.reaper import start_reaper
from noid_bench.http_load import Asking, Load, Target, exchange, load, request_bytes
from noid_bench.report import Figure
from noid_bench.rig import scratch_directory

VMS = 20
TURNS = 20
IN_TURN = 300
TOGETHER = 8
AT_ONCE = 800
_VM = {"cpus": 1, "mem_mib": 128}
_STOP_SECS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    """One request, asked of one server, in every round: one after the other, and several together."""

    alone: list[Load]
    crowded: list[Load]

    def p50_ms(self) -> tuple[float, ...]:
        return tuple(one.quantile(0.5) * 1e3 for one in self.alone)

    def p99_ms(self) -> tuple[float, ...]:
        return tuple(one.quantile(0.99) * 1e3 for one in self.alone)

    def cpu_us(self) -> tuple[float, ...]:
        return tuple(one.cpu_secs_per_request * 1e6 for one in self.crowded)

    def note(self) -> str:
        """Say the same of a server that is only noted."""
        rate = median(one.requests_per_sec for one in self.crowded)
        return f"p50 {median(self.p50_ms()):.2f} ms, p99 {median(self.p99_ms()):.2f} ms, {rate:.0f} requests/s"


def measure_server(rounds: int, parent: Path) -> list[Figure]:
    """Measure with *rounds* samples each, working below *parent*; nothing is left there."""
    with reaped_directory(parent) as directory, contextlib.ExitStack() as stack:
        token, noid = stack.enter_context(simulated_server(directory))
        with noid.connect() as sock:
            for number in range(VMS):
                body = json.dumps({"name": f"vm-{number}", **_VM}).encode()
                head, answer = exchange(sock, request_bytes("POST", "/v1/vms", token, body))
                if not head.startswith(b"HTTP/1.1 201"):
                    raise BackendError(f"the bench's server did not make a VM: {answer!r}")
            command = json.dumps({"command": ["true"]}).encode()
            requests = {
                "GET /healthz": request_bytes("GET", "/healthz", token),
                "GET /v1/vms": request_bytes("GET", "/v1/vms", token),
                "POST /v1/vms/vm-0/exec": request_bytes("POST", "/v1/vms/vm-0/exec", token, command),
            }
            answers = {asked: _answer(*exchange(sock, request)) for asked, request in requests.items()}
        targets = [
            noid,
            *(stack.enter_context(_bare_server(kind, answers, directory)) for kind in ("hypercorn", "trio")),
        ]
        healthz, vms, execs = (_measure(targets, request, rounds) for request in requests.values())
    return _figures(healthz, vms, execs)


def _figures(healthz: list[_Measured], vms: list[_Measured], execs: list[_Measured]) -> list[Figure]:
    floor = "bare hypercorn, the same bytes"
    return [
        Figure(
            name="GET /healthz: p50",
            unit="ms",
            samples=healthz[0].p50_ms(),
            floor=healthz[1].p50_ms(),
            floor_name=floor,
            aim=1.4,
            note=_notes(healthz),
        ),
        Figure(
            name="GET /healthz: p99",
            unit="ms",
            samples=healthz[0].p99_ms(),
            floor=healthz[1].p99_ms(),
            floor_name=floor,
        ),
        Figure(
            name="GET /healthz: CPU",
            unit="us",
            samples=healthz[0].cpu_us(),
            floor=healthz[1].cpu_us(),
            floor_name=floor,
            aim=1.4,
            note=_cpu_note(healthz),
        ),
        Figure(
            name="GET /v1/vms, 20 VMs, authenticated: p50",
            unit="ms",
            samples=vms[0].p50_ms(),
            floor=vms[1].p50_ms(),
            floor_name=floor,
            aim=1.4,
            note=_notes(vms),
        ),
        Figure(
            name="GET /v1/vms, 20 VMs, authenticated: p99",
            unit="ms",
            samples=vms[0].p99_ms(),
            floor=vms[1].p99_ms(),
            floor_name=floor,
        ),
        Figure(
            name="GET /v1/vms, 20 VMs, authenticated: CPU",
            unit="us",
            samples=vms[0].cpu_us(),
            floor=vms[1].cpu_us(),
            floor_name=floor,
            aim=1.4,
            note=_cpu_note(vms),
        ),
        Figure(
            name="POST exec of true in a simulated guest: p50",
            unit="ms",
            samples=execs[0].p50_ms(),
            floor=execs[1].p50_ms(),
            floor_name=floor,
            note=_notes(execs),
        ),
        Figure(
            name="POST exec of true in a simulated guest: p99",
            unit="ms",
            samples=execs[0].p99_ms(),
            floor=execs[1].p99_ms(),
            floor_name=floor,
        ),
        Figure(
            name="POST exec of true in a simulated guest: CPU",
            unit="us",
            samples=execs[0].cpu_us(),
            floor=execs[1].cpu_us(),
            floor_name=floor,
            note=_cpu_note(execs),
        ),
    ]


def _notes(measured: list[_Measured]) -> str:
    noid, hypercorn, bare = (one.note() for one in measured)
    return f"{noid} of {TOGETHER} clients; bare hypercorn {hypercorn}; bare trio and h11 {bare}"


def _cpu_note(measured: list[_Measured]) -> str:
    return f"bare trio and h11 {median(measured[2].cpu_us()):.0f} us"


def _measure(targets: list[Target], request: bytes, rounds: int) -> list[_Measured]:
    measured = [_Measured(alone=[], crowded=[]) for _ in targets]
    for target in targets:
        load(target, request, AT_ONCE // 4, together=TOGETHER)  # warm
    for _ in range(rounds):
        with contextlib.ExitStack() as stack:
            askings = [
                (stack.enter_context(Asking(target, request)), stack.enter_context(Asking(target, request, TOGETHER)))
                for target in targets
            ]
            for _ in range(TURNS):  # short ones: what else the machine does hits all of them alike
                for alone, crowded in askings:
                    alone.ask(IN_TURN // TURNS)
                    crowded.ask(AT_ONCE // TURNS)
            for found, (alone, crowded) in zip(measured, askings, strict=True):
                found.alone.append(alone.load())
                found.crowded.append(crowded.load())
    return measured


def _answer(head: bytes, body: bytes) -> dict[str, Any]:
    status, *lines = head.decode().splitlines()
    headers = [line.split(": ", 1) for line in lines if line]
    if status.split()[1] != "200":
        raise BackendError(f"the bench's server answered {status}: {body!r}")
    return {"status": 200, "headers": headers, "body": body.decode()}


# --- the servers ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def reaped_directory(parent: Path) -> Iterator[Path]:
    """Make a directory below *parent*. At the end, however this process ends, it goes with every process of it."""
    with scratch_directory(parent) as directory, start_reaper(directory) as reaper:
        try:
            yield directory
        finally:
            reaper.communicate()  # closes its stdin, which is the sign to clean


@contextlib.contextmanager
def simulated_server(directory: Path, name: str = "noid") -> Iterator[tuple[str, Target]]:
    """Run noid's server on simulated machines in *directory* and yield its user's token and where it is.

    *name* is that of its data there, one for each that runs at the same time.
    """
    data_dir = directory / name
    data_dir.mkdir(mode=0o700)
    with _program("noid_bench.simulated_server", [str(data_dir)], directory / f"{name}.log", b"") as (token, target):
        yield token, target


@contextlib.contextmanager
def _bare_server(kind: str, answers: dict[str, Any], directory: Path) -> Iterator[Target]:
    log = directory / f"{kind}.log"
    with _program("noid_bench.bare_servers", [kind], log, json.dumps(answers).encode()) as (_, target):
        yield target


@contextlib.contextmanager
def _program(module: str, arguments: list[str], log: Path, stdin: bytes) -> Iterator[tuple[str, Target]]:
    """Run a server in a process of its own, and yield what it said once it served, and where it is."""
    with socket.socket() as reserved:  # stays bound, so that nobody else is given the port; only the server listens
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        address = reserved.getsockname()
        reader, writer = os.pipe()
        argv = [sys.executable, "-m", module, *arguments, f"{address[0]}:{address[1]}", str(writer)]
        with log.open("ab") as file:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                pass_fds=(writer,),
                env={**os.environ, "NOID_DATA_DIR": str(log.parent)},  # by which the reaper knows it
            )
        os.close(writer)
        try:
            assert process.stdin is not None  # noqa: S101  # made with a pipe
            with process.stdin:
                process.stdin.write(stdin)
            with os.fdopen(reader) as pipe:
                said = pipe.read()
            if not said:
                raise BackendError(f"{module} did not start: {log.read_text()[-2000:]}")
            yield said, Target(name=module, address=address, pid=process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_SECS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
