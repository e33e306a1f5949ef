"""What commands and copies cost: through the API, over the bare agent, over a port that carries nothing but bytes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import trio
from noid_exec_vsock.guest import connect

from noid.core import paths
from noid.core.backends import Guest, Process
from noid.core.model.guest_processes import OutputChunk, ProcessExit
from noid.core.model.processes import ExecRequest
from noid.errors import BackendError
from noid_bench.floors import BareMachine
from noid_bench.measures import bare_machines, golden_pattern, in_ms, settled
from noid_bench.report import Figure
from noid_bench.rig import Rig

OUTPUT_BYTES = 32 << 20
ROUND_TRIPS = 15
ANSWERS = 100
IDLE_SECS = 10
_WRITE = ("dd", "if=/dev/zero", "bs=65536", f"count={OUTPUT_BYTES >> 16}")
_SWALLOW = ("dd", "of=/dev/null", "bs=65536")
_PORT = "plain.0"
_PATIENCE_SECS = 120.0

# Waits for the port, opens it, and for each byte it is sent writes as much as the others do: a program, a pipe, and
# somebody who carries what comes out of the pipe to the port. That is what an agent does that adds nothing at all.
_FORWARD = f"""
while :; do
    for port in /sys/class/virtio-ports/*; do
        [ "$(cat $port/name 2>/dev/null)" = {_PORT} ] || continue
        exec <>/dev/${{port##*/}} >&0
        while [ -n "$(dd bs=1 count=1 2>/dev/null)" ]; do
            {" ".join(_WRITE)} 2>/dev/null | dd bs=32768 2>/dev/null
        done
    done
    sleep 0.1
done
"""


async def commands(rig: Rig, rounds: int) -> list[Figure]:
    """Round trips, throughput both ways, an answer beside a flood, and what the guest's agent takes."""
    vm = await rig.create("commands")
    pattern = golden_pattern(rig, vm)
    await settled(rig)
    async with bare_machines(rig, pattern, 2) as machines:
        for machine in machines:
            await trio.to_thread.run_sync(machine.start)
        async with _driver(rig, vm.name) as api, _bare_agent(machines[0]) as raw, _plain_port(machines[1]) as plain:
            for runner in (api.run, raw.run):
                await runner("true")  # each reads its program once
            figures = await _round_trips(api, raw, rounds)
            figures += await _throughput(api, raw, plain, rounds)
            figures.append(await _answers_beside_a_flood(raw.guest, rounds))
            figures += await _agent(raw)
    await rig.agent.destroy_vm(rig.user, vm.name)
    return figures


async def _round_trips(api: _Api, raw: _Raw, rounds: int) -> list[Figure]:
    samples, floor, own = [], [], []
    for _ in range(rounds * ROUND_TRIPS):
        samples.append(await api.run("true"))
        own.append(api.own_secs)
        floor.append(await raw.run("true"))
    share = [one - other - client for one, other, client in zip(samples, floor, own, strict=True)]
    return [
        Figure(
            name="exec of /bin/true by API",
            unit="ms",
            samples=in_ms(samples),
            floor=in_ms(floor),
            floor_name="the same over the bare agent",
            must=1.5,
        ),
        Figure(
            name="exec of /bin/true by API: the server's share",
            unit="ms",
            samples=in_ms(share),
            must=3.0,
            note=f"the client's own CPU time, not counted: {median(in_ms(own)):.2f} ms",
        ),
    ]


async def _throughput(api: _Api, raw: _Raw, plain: Callable[[], Awaitable[float]], rounds: int) -> list[Figure]:
    by_api, by_agent, by_port, input_api, input_agent, copied_in, copied_out = [], [], [], [], [], [], []
    for _ in range(rounds):
        by_api.append(await api.run(*_WRITE))
        by_agent.append(await raw.run(*_WRITE))
        by_port.append(await plain())
        input_api.append(await api.run(*_SWALLOW, stdin_bytes=OUTPUT_BYTES))
        input_agent.append(await raw.run(*_SWALLOW, stdin_bytes=OUTPUT_BYTES))
        into, out = await api.copy()
        copied_in.append(into)
        copied_out.append(out)
    return [
        Figure(
            name="32 MiB of output through the agent",
            unit="ms",
            samples=in_ms(by_agent),
            floor=in_ms(by_port),
            floor_name="a pipe carried to a virtio-serial port, bytes only",
            must=1.25,
            note=_rates(agent=by_agent, port=by_port),
        ),
        Figure(
            name="32 MiB of output by API",
            unit="ms",
            samples=in_ms(by_api),
            floor=in_ms(by_agent),
            floor_name="the same over the bare agent",
            must=1.25,
            note=_rates(api=by_api, agent=by_agent),
        ),
        Figure(
            name="32 MiB of input by API",
            unit="ms",
            samples=in_ms(input_api),
            floor=in_ms(input_agent),
            floor_name="the same over the bare agent",
            note=_rates(api=input_api, agent=input_agent),
        ),
        Figure(
            name="a file of 32 MiB copied into a VM",
            unit="ms",
            samples=in_ms(copied_in),
            floor=in_ms(input_agent),
            floor_name="32 MiB of input over the bare agent",
            must=1.5,
            note=_rates(copy=copied_in, agent=input_agent),
        ),
        Figure(
            name="a file of 32 MiB copied out of a VM",
            unit="ms",
            samples=in_ms(copied_out),
            floor=in_ms(by_agent),
            floor_name="32 MiB of output over the bare agent",
            must=1.5,
            note=_rates(copy=copied_out, agent=by_agent),
        ),
    ]


async def _answers_beside_a_flood(guest: Guest, rounds: int) -> Figure:
    """Ask one process for a byte, again and again, while another writes as fast as it can and is read."""
    worst = []
    async with trio.open_nursery() as nursery:
        flood = await guest.start(ExecRequest(argv=("dd", "if=/dev/zero", "bs=65536")))
        echo = await guest.start(ExecRequest(argv=("cat",), stdin=True))
        flooded = 0

        async def drink() -> None:
            def swallow(chunk: OutputChunk) -> None:
                nonlocal flooded
                flooded += len(chunk.data)

            await _hear(flood, swallow)

        nursery.start_soon(drink)
        began = time.perf_counter()
        for _ in range(rounds):
            answers = []
            for _ in range(ANSWERS):
                asked = time.perf_counter()
                await echo.send_stdin(b"?")
                await echo.receive()
                answers.append(time.perf_counter() - asked)
            worst.append(sorted(answers)[ANSWERS * 99 // 100 - 1])
        rate = flooded / (time.perf_counter() - began) / 1e6
        nursery.cancel_scope.cancel()
    for process in (flood, echo):
        await guest.release(process)
    return Figure(
        name="1-byte answer beside a flood of output, p99 of 100",
        unit="ms",
        samples=in_ms(worst),
        must=50.0,
        note=f"the flood: {rate:.0f} MB/s",
    )


async def _agent(raw: _Raw) -> list[Figure]:
    """Return the memory and the idle CPU time of the agent in the guest."""
    place = f"/proc/{raw.agent_pid}"
    status = (await raw.output("cat", f"{place}/status")).splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in status if line.startswith(("VmRSS", "RssAnon"))}
    # One process looks twice, and says what it saw only then: starting one is work for the agent.
    script = f'a=$(cat {place}/stat); sleep {IDLE_SECS}; b=$(cat {place}/stat); echo "$a"; echo "$b"'
    before, after = (
        sum(map(int, line.rpartition(")")[2].split()[11:13]))
        for line in (await raw.output("sh", "-c", script)).splitlines()
    )
    return [
        Figure(
            name="guest agent: resident memory",
            unit="MB",
            samples=(kib["VmRSS"] * 1024 / 1e6,),
            must=1.0,
            note=f"its own, without what it maps of its program: {kib['RssAnon']} KiB",
        ),
        Figure(name="guest agent: CPU ticks in 10 idle seconds", unit="", samples=(float(after - before),), must=0.0),
    ]


# --- the three ways -------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _driver(rig: Rig, vm: str) -> AsyncIterator[_Api]:
    """Yield what runs commands in *vm* through the API, in a client of its own process."""
    argv = [sys.executable, "-m", "noid_bench.driver", str(paths.socket_path(rig.layout.data_dir))]
    async with trio.open_nursery() as nursery:
        process = await nursery.start(partial(trio.run_process, argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        yield _Api(vm=vm, client=process)
        await process.stdin.aclose()


@dataclass(slots=True, kw_only=True)
class _Api:
    """A client of the server. *own_secs* is the CPU time it took itself for the last command."""

    vm: str
    client: trio.Process
    own_secs: float = 0.0

    async def run(self, *argv: str, stdin_bytes: int = 0) -> float:
        """Run a command and return the seconds its client waited."""
        (answer,) = await self._ask({"argv": argv, "stdin_bytes": stdin_bytes}, 1)
        _checked(argv, answer["exit_code"], answer["bytes"])
        self.own_secs = float(answer["own_secs"])
        return float(answer["secs"])

    async def copy(self) -> tuple[float, float]:
        """Copy a file into the VM and out again, and return the seconds of each."""
        into, out = await self._ask({"copy": OUTPUT_BYTES}, 2)
        if (into["bytes"], out["bytes"]) != (OUTPUT_BYTES, OUTPUT_BYTES):
            raise BackendError(f"the bench copied {into['bytes']} bytes into the VM and {out['bytes']} out of it")
        return float(into["secs"]), float(out["secs"])

    async def _ask(self, task: dict[str, object], answers: int) -> list[dict[str, Any]]:
        assert self.client.stdin is not None  # noqa: S101  # made with pipes
        assert self.client.stdout is not None  # noqa: S101
        await self.client.stdin.send_all(json.dumps({"vm": self.vm, **task}).encode() + b"\n")
        said = b""
        while said.count(b"\n") < answers:
            received = await self.client.stdout.receive_some()
            if not received:
                raise BackendError("the bench's client ended early")
            said += received
        return [json.loads(line) for line in said.splitlines()]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Raw:
    """The agent of a machine without a server."""

    guest: Guest
    agent_pid: int

    async def run(self, *argv: str, stdin_bytes: int = 0) -> float:
        """Run a command and return the seconds from START to EXIT."""
        started = time.perf_counter()
        process = await self.guest.start(ExecRequest(argv=argv, stdin=stdin_bytes > 0))
        if stdin_bytes:
            piece = bytes(65536)
            for _ in range(stdin_bytes // len(piece)):
                await process.send_stdin(piece)
            await process.close_stdin()
        size = 0

        def count(chunk: OutputChunk) -> None:
            nonlocal size
            size += len(chunk.data)

        end = await _hear(process, count)
        seconds = time.perf_counter() - started
        await self.guest.release(process)  # until then the guest keeps its log
        _checked(argv, end.status, size)
        return seconds

    async def output(self, *argv: str) -> str:
        """Run a command and return what it printed."""
        process = await self.guest.start(ExecRequest(argv=argv))
        output = bytearray()
        end = await _hear(process, lambda chunk: output.extend(chunk.data))
        await self.guest.release(process)
        _checked(argv, end.status, len(output))
        return output.decode()


async def _hear(process: Process, take: Callable[[OutputChunk], None]) -> ProcessExit:
    while not isinstance(received := await process.receive(), ProcessExit):
        if not isinstance(received, OutputChunk):
            raise BackendError(f"the bench lost output: {received}")
        take(received)
    return received


def _checked(argv: tuple[str, ...], status: int | None, size: int) -> None:
    if status != 0 or (argv == _WRITE and size < OUTPUT_BYTES):
        raise BackendError(f"{argv} ended with {status} after {size} bytes of output")


@contextlib.asynccontextmanager
async def _bare_agent(machine: BareMachine) -> AsyncIterator[_Raw]:
    async with connect(partial(trio.open_unix_socket, machine.channel)) as guest:
        yield _Raw(guest=guest, agent_pid=guest.hello.pid)


@contextlib.asynccontextmanager
async def _plain_port(machine: BareMachine) -> AsyncIterator[Callable[[], Awaitable[float]]]:
    """Put a port without an agent into the place of the agent's; yield what times one transfer over it."""
    async with _bare_agent(machine) as raw:
        await raw.guest.start(ExecRequest(argv=("setsid", "sh", "-c", _FORWARD)))
    port = {"driver": "virtserialport", "id": "plain", "chardev": "agent", "name": _PORT}
    await trio.to_thread.run_sync(lambda: machine.command("device_del", {"id": "channel"}, until="DEVICE_DELETED"))
    await trio.to_thread.run_sync(machine.command, "device_add", port)
    stream = await trio.open_unix_socket(machine.channel)

    async def transfer() -> float:
        with trio.fail_after(_PATIENCE_SECS):
            started = time.perf_counter()
            await stream.send_all(b"!")
            left = OUTPUT_BYTES
            while left > 0:
                received = await stream.receive_some(1 << 18)
                if not received:
                    raise BackendError("the bare machine's port was closed")
                left -= len(received)
            return time.perf_counter() - started

    async with stream:
        await transfer()  # waits until the guest has found the port
        yield transfer


def _rates(**seconds: list[float]) -> str:
    each = (f"{name} {OUTPUT_BYTES / sorted(known)[len(known) // 2] / 1e6:.0f} MB/s" for name, known in seconds.items())
    return ", ".join(each)
