"""The measurements, a function for each line of the table. Floors alternate with noid: the machine's moods hit both."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from noid.core.model.storage import FrozenDisk
from noid.core.model.vms import Vm
from noid.core.operations.outcomes import Outcome
from noid_bench.floors import BareMachine, Pattern
from noid_bench.report import Figure
from noid_bench.rig import Rig

CLONES = 10
IDLE_SECS = 10.0
_POOL_SECS = 120.0
_numbers = itertools.count(1)


async def create_from_golden(rig: Rig, rounds: int) -> list[Figure]:
    """Create from the golden template until the first exec has answered, over a bare restore and ping.

    As one meets it: with a machine waiting in the pool, as is the case a moment after the create before. And with the
    pool empty, as in a burst.
    """
    first = await rig.create("golden-first")  # boots the template, if there is none
    pattern = golden_pattern(rig, first)

    async def bare() -> float:
        [secs] = await _bare(rig, pattern, 1)
        return secs

    async def make(name: str) -> None:
        await rig.create(name)
        await rig.run(name, "true")

    pairs = await in_pairs(rig, rounds, settled, bare, make)
    await rig.agent.destroy_vm(rig.user, first.name)
    floor_name = "bare QEMU restore and agent ping"
    return [
        Figure(
            name="create from golden to first exec",
            unit="ms",
            samples=pairs.ready,
            floor=pairs.floor,
            floor_name=floor_name,
            must=2.0,
            aim=1.3,
            note="a machine was waiting in the pool, as it does a moment after the create before",
        ),
        Figure(
            name="the same, right after another (pool empty)",
            unit="ms",
            samples=pairs.right_after,
            floor=pairs.floor,
            floor_name=floor_name,
        ),
    ]


async def checkpoint_pause(rig: Rig, rounds: int, storage: str) -> Figure:
    """How long a checkpoint of a fresh clone with a few MB changed makes its guest stand still."""
    source = await rig.create("pause-source")
    origin = await _checkpoint(rig, source.name)
    await settled(rig)
    samples, changed = [], []
    for number in range(rounds):
        name = f"pause-{number}"
        await rig.fork(source.name, origin, name)
        await rig.run(name, "sh", "-c", "head -c 1000000 /dev/urandom > /dev/shm/noise")
        outcome: Outcome = await rig.agent.checkpoints.take(rig.user, name, None)
        samples.append(outcome.timings["pause"])
        changed.append((outcome.changed_bytes or 0) / 1e6)
        await rig.agent.destroy_vm(rig.user, name)
    await rig.agent.destroy_vm(rig.user, source.name)
    return Figure(
        name=f"checkpoint pause, {storage}",
        unit="ms",
        samples=in_ms(samples),
        must=15.0,
        aim=5.0,
        note=f"{min(changed):.1f} to {max(changed):.1f} MB of memory changed",
        details={"changed_mb": changed},
    )


async def copied_by_a_clone(rig: Rig) -> list[Figure]:
    """The bytes of memory and of disk that a clone copies: blocks of files that are its own and hold guest data."""
    source = await rig.create("copied-source")
    origin = await _checkpoint(rig, source.name)
    clone = await rig.fork(source.name, origin, "copied")
    directory = rig.directory(clone)
    memory = 0 if (directory / "memory").stat().st_nlink > 1 else (directory / "memory").stat().st_blocks * 512
    disk = await trio.to_thread.run_sync(lambda: sum(_own_data_bytes(path) for path in directory.glob("disk*")))
    for name in (clone.name, source.name):
        await rig.agent.destroy_vm(rig.user, name)
    return [
        Figure(name="bytes of RAM copied by a clone", unit="", samples=(float(memory),), must=0.0),
        Figure(name="bytes of disk copied by a clone (overlay)", unit="", samples=(float(disk),), must=0.0),
    ]


async def ten_clones(rig: Rig, rounds: int) -> Figure:
    """Ten clones of one checkpoint at once, until all answer, over a bare loop that starts the same ten."""
    source = await rig.create("ten-source")
    origin = await _checkpoint(rig, source.name)
    one = await rig.fork(source.name, origin, "ten-pattern")
    pattern = _pattern(rig, one, rig.layout.checkpoint(rig.user.id, origin))
    await settled(rig)
    samples, floor = [], []
    for _ in range(rounds):
        await ready(rig)  # while one is made, the processors are busy with that
        await _bare(rig, pattern, CLONES)
        floor.append(_bare_wall.pop())
        names = [f"ten-{next(_numbers)}" for _ in range(CLONES)]

        async def clone(name: str) -> None:
            await rig.fork(source.name, origin, name)
            async with rig.agent.guests.reach(rig.user, name) as guest:
                await guest.ping()

        started = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(clone, name)
        samples.append(time.perf_counter() - started)
        for name in names:
            await rig.agent.destroy_vm(rig.user, name)
    for name in (one.name, source.name):
        await rig.agent.destroy_vm(rig.user, name)
    return Figure(
        name="ten clones at once, all answering",
        unit="ms",
        samples=in_ms(samples),
        floor=in_ms(floor),
        floor_name="bare loop that starts the same ten",
        must=2.0,
        aim=1.3,
    )


async def exec_command(rig: Rig, rounds: int, environment: dict[str, str]) -> Figure:
    """What ``noid exec VM -- true`` takes beyond the same exec through the agent in this process."""
    vm = await rig.create("exec")
    await rig.run(vm.name, "true")
    await settled(rig)
    samples = []
    for _ in range(rounds):
        started = time.perf_counter()
        await rig.run(vm.name, "true")
        inside = time.perf_counter() - started
        samples.append(await _command(("exec", vm.name, "--", "true"), environment) - inside)
    await rig.agent.destroy_vm(rig.user, vm.name)
    return Figure(name="noid exec VM -- true, beyond the API", unit="ms", samples=in_ms(samples), must=120.0, aim=80.0)


async def list_command(rounds: int, environment: dict[str, str]) -> Figure:
    """``noid list``, the whole process."""
    samples, python = [], []
    for _ in range(rounds):
        started = time.perf_counter()
        await trio.run_process([sys.executable, "-c", "pass"])
        python.append(time.perf_counter() - started)
        samples.append(await _command(("list",), environment))
    note = f"python -c pass: {sorted(python)[len(python) // 2] * 1000:.0f} ms"
    return Figure(name="noid list, cold", unit="ms", samples=in_ms(samples), must=120.0, aim=60.0, note=note)


async def idle_agent(pid: int, vmm_pids: list[int]) -> list[Figure]:
    """What an agent with *vmm_pids* idle VMs takes: its resident memory, and CPU for each VM."""
    await trio.sleep(2)  # start-up and adoption are not idling
    before, vmms_before = _cpu_secs(pid), sum(map(_cpu_secs, vmm_pids))
    await trio.sleep(IDLE_SECS)
    each = (_cpu_secs(pid) - before) / IDLE_SECS / max(1, len(vmm_pids)) * 100
    vmms = (sum(map(_cpu_secs, vmm_pids)) - vmms_before) / IDLE_SECS / max(1, len(vmm_pids)) * 100
    note = f"the VMM processes themselves: {vmms:.2f} % each ({len(vmm_pids)} VMs)"
    return [
        Figure(name="idle agent: resident memory", unit="MB", samples=(_resident_mb(pid),), must=90.0),
        Figure(name="idle agent: CPU for each idle VM", unit="%", samples=(each,), must=0.2, note=note),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Milliseconds: with something standing *ready*, *right_after* that was taken, and those of bare calls."""

    ready: tuple[float, ...]
    right_after: tuple[float, ...]
    floor: tuple[float, ...]


async def in_pairs(
    rig: Rig,
    rounds: int,
    calm: Callable[[Rig], Awaitable[None]],
    bare: Callable[[], Awaitable[float]],
    make: Callable[[str], Awaitable[object]],
) -> Pairs:
    """Time *make*, which makes the VM of the name it is given, twice in a row after each *bare*, that tells its own."""
    floor: list[float] = []
    first: list[float] = []
    second: list[float] = []
    for number in range(rounds):
        await calm(rig)
        floor.append(await bare())
        names = f"first-{number}", f"second-{number}"
        for samples, name in zip((first, second), names, strict=True):
            started = time.perf_counter()
            await make(name)
            samples.append(time.perf_counter() - started)
        for name in names:
            await rig.agent.destroy_vm(rig.user, name)
    return Pairs(ready=in_ms(first), right_after=in_ms(second), floor=in_ms(floor))


async def settled(rig: Rig) -> None:
    """Wait until a machine waits in the pool: making it keeps the processors busy, which is not what is measured."""
    with trio.fail_after(_POOL_SECS):
        while rig.agent.waiting_machines == 0:  # noqa: ASYNC110  # a bench is nobody to add an event for
            await trio.sleep(0.1)


async def ready(rig: Rig) -> None:
    """Wait until a copy of the checkpoint that was restored last stands ready."""
    with trio.fail_after(_POOL_SECS):
        while rig.agent.ready_copies == 0:  # noqa: ASYNC110  # as above
            await trio.sleep(0.1)


_bare_wall: list[float] = []


async def _bare(rig: Rig, pattern: Pattern, count: int) -> list[float]:
    """Start *count* bare machines at once, and return how long each took; the whole is put into `_bare_wall`."""
    async with bare_machines(rig, pattern, count) as machines:

        def start() -> list[float]:
            started = time.perf_counter()
            with concurrent.futures.ThreadPoolExecutor(count) as pool:
                seconds = list(pool.map(BareMachine.start, machines))
            _bare_wall.append(time.perf_counter() - started)
            return seconds

        return await trio.to_thread.run_sync(start)


@contextlib.asynccontextmanager
async def bare_machines(rig: Rig, pattern: Pattern, count: int) -> AsyncIterator[list[BareMachine]]:
    """Yield *count* machines like *pattern*, prepared and not yet started, and end them."""
    machines = [BareMachine(pattern, rig.layout.data_dir / f"bare-{next(_numbers)}") for _ in range(count)]
    storage = rig.agent.services.storage
    source = storage.volume(pattern.directory)
    frozen = FrozenDisk(
        directory=pattern.disk, format=source.format, top=_frozen_top(pattern.disk), files=_names(pattern.disk)
    )
    try:
        for machine in machines:
            machine.prepare()
            made = await storage.clone(frozen, machine.directory)
            if made.top != source.top:  # the command line names the pattern's file
                made.path.rename(machine.directory / source.top)
        yield machines
    finally:
        for machine in machines:
            machine.end()


def golden_pattern(rig: Rig, vm: Vm) -> Pattern:
    """Return how *vm*, which woke from a golden template, was restored."""
    return _pattern(rig, vm, rig.layout.golden / (vm.origin or "").removeprefix("golden/"))


def _pattern(rig: Rig, vm: Vm, origin: Path) -> Pattern:
    if vm.process is None:
        raise RuntimeError("a VM without a process")
    return Pattern.of(vm.process.pid, rig.directory(vm), origin / "state", origin / "disk")


def _frozen_top(disk: Path) -> str:
    return _names(disk)[-1]


def _names(disk: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in disk.iterdir()))


async def _checkpoint(rig: Rig, name: str) -> str:
    checkpoint = (await rig.agent.checkpoints.take(rig.user, name, None)).checkpoint
    if checkpoint is None:
        raise RuntimeError("a checkpoint operation without a checkpoint")
    return checkpoint.id


async def _command(arguments: tuple[str, ...], environment: dict[str, str]) -> float:
    noid = str(Path(sys.executable).with_name("noid"))
    started = time.perf_counter()
    await trio.run_process([noid, *arguments], env=environment, capture_stdout=True, cwd="/")
    return time.perf_counter() - started


def _own_data_bytes(path: Path) -> int:
    """Return the bytes of guest data a disk file holds by itself, not counting what it shares or lies over."""
    if path.stat().st_nlink > 1:
        return 0
    argv = ["qemu-img", "map", "-U", "--output=json", str(path)]
    extents: list[dict[str, Any]] = json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)
    return sum(extent["length"] for extent in extents if extent["depth"] == 0 and extent["data"])


def _cpu_secs(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def in_ms(seconds: list[float]) -> tuple[float, ...]:
    """Return *seconds* as milliseconds."""
    return tuple(value * 1000 for value in seconds)
