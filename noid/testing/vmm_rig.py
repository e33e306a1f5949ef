"""What the conformance suite does with a VMM: boots, captures, clones and talks to machines, and ends all of them."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from noid.core.backends import (
    ExecBackend,
    Guest,
    LaunchPlan,
    Machine,
    MachinePlan,
    RestorePlan,
    StorageBackend,
    VmmBackend,
)
from noid.core.guests.console import open_console
from noid.core.model.guest_processes import OutputChunk, ProcessExit
from noid.core.model.images import Image
from noid.core.model.processes import ExecRequest
from noid.core.model.storage import FrozenDisk, Volume
from noid.core.model.vms import Identity
from noid.testing.pace import slowness
from noid.testing.processes import marked_processes
from noid.testing.results import tell

ANSWER_SECS = 60.0 * slowness()
TICK_SECS = 0.05
_CLOSE_SECS = 20.0 * slowness()
_LAST_WORDS_BYTES = 3000

Argv = tuple[str, ...]


def shell_counter(path: str, ignore_term: bool) -> Argv:
    """Return a command that counts up the number in *path* every `TICK_SECS`, readable whole at any time."""
    trap = "trap '' TERM; " if ignore_term else ""
    loop = (
        f'n=$(cat "$0" 2>/dev/null); while :; do n=$((n+1)); echo $n >"$0.new"; mv "$0.new" "$0"; sleep {TICK_SECS}; '
    )
    return ("sh", "-c", f"{trap}{loop}done", path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """How a command ended, and what it said."""

    end: ProcessExit
    stdout: bytes
    stderr: bytes

    @property
    def status(self) -> int:
        """What a shell would show."""
        return self.end.status


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A machine and the plan it was made by."""

    machine: Machine
    plan: MachinePlan

    @property
    def memory(self) -> Path:
        """The image it maps."""
        return self.plan.directory / "memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """A checkpoint: *directory* holds ``memory`` and ``state``."""

    directory: Path
    disk: FrozenDisk


@dataclass(kw_only=True)
class VmmRig:
    """A backend under test and what it needs.

    Attributes:
        image: What boots. Its guest has ``sh``, ``cat``, ``tee``, ``sleep``, ``echo``, ``env``, ``pwd``, ``id``,
            ``yes``, ``date`` and ``nc``, the users ``root`` and ``noid``, and memory file systems at ``/dev/shm`` and
            ``/run``.
        data_dir: New for each test.
        shared: Survives the test: the first one that wants a machine puts a capture there, the others clone it.
        counter: The command that counts, given a path and whether it shall ignore SIGTERM.
        simulated: Whether all of it is made up, as the table of results says.
        echo: The command that serves TCP port 7, which gives back what it hears until that ends.
    """

    vmm: VmmBackend
    exec_backend: ExecBackend
    storage: StorageBackend
    image: Image
    data_dir: Path
    shared: Path
    mem_mib: int = 128
    counter: Callable[[str, bool], Argv] = shell_counter
    echo: Argv = ("nc", "-ll", "-p", "7", "-e", "cat")
    simulated: bool = False
    _machines: list[Machine] = field(default_factory=list)
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        """Tell the table of results what this test is about."""
        facts = self.vmm.fingerprint()
        name = f"{facts.get('vmm', self.vmm.name)} {facts.get('version', '')}".strip()
        accelerator = self.vmm.features.accelerator or "none"
        if self.simulated:
            name, accelerator = f"simulated {name}", "none"
        tell("promises of a VMM", name.replace("simulated simulated", "simulated"), accelerator)

    # --- machines --------------------------------------------------------------------------------------------------

    async def plan(self, source: FrozenDisk | None = None) -> MachinePlan:
        """Return a plan with new directories and a disk cloned from *source*, or from the image."""
        instance = f"m{next(self._numbers)}-{secrets.token_hex(3)}"
        directory, run_dir = self.data_dir / "vms" / instance, self.data_dir / "run" / instance
        directory.mkdir(parents=True)
        run_dir.mkdir(parents=True)
        rootfs = self.image.rootfs
        root = FrozenDisk(directory=rootfs.parent, format="raw", top=rootfs.name, files=(rootfs.name,))
        volume = await self.storage.clone(source or root, directory)
        return MachinePlan(
            instance=instance, directory=directory, run_dir=run_dir, data_dir=self.data_dir, cpus=1,
            mem_mib=self.mem_mib, volume=volume, lease=None,
        )  # fmt: skip

    async def launch_plan(self) -> LaunchPlan:
        """Return a plan that boots."""
        image = self.image
        return LaunchPlan(**_fields(await self.plan()), kernel=image.kernel, initrd=image.initrd, cmdline=image.cmdline)

    async def restore_plan(self, taken: Taken) -> RestorePlan:
        """Return a plan that continues *taken*: memory hard-linked, disk cloned."""
        plan = await self.plan(taken.disk)
        (plan.directory / "memory").hardlink_to(taken.directory / "memory")
        state = taken.directory / "state"
        return RestorePlan(**_fields(plan), memory=plan.directory / "memory", state=state)

    async def launch(self, plan: LaunchPlan | None = None) -> Running:
        """Boot a machine."""
        plan = plan or await self.launch_plan()
        machine = await self.vmm.launch(plan)
        self._machines.append(machine)
        return Running(machine=machine, plan=plan)

    async def clone(self, taken: Taken, *, paused: bool = False) -> Running:
        """Continue *taken* in a machine of its own, not woken."""
        plan = dataclasses.replace(await self.restore_plan(taken), paused=paused)
        machine = await self.vmm.restore(plan)
        self._machines.append(machine)
        return Running(machine=machine, plan=plan)

    async def fresh(self) -> Running:
        """Return a running machine whose guest answers, the quick way: a clone of one capture all tests share."""
        golden = self.shared / "golden"
        if not golden.exists():
            booted = await self.launch()
            assert (await self.run(booted, "true")).status == 0
            partial = self.shared / f"golden.{secrets.token_hex(3)}"
            taken = await self.checkpoint(booted, partial)
            await booted.machine.kill()
            (partial / "disk.json").write_text("\n".join([taken.disk.format, taken.disk.top, *taken.disk.files]))
            partial.rename(golden)
        form, top, *files = (golden / "disk.json").read_text().split("\n")
        disk = FrozenDisk(directory=golden / "disk", format=form, top=top, files=tuple(files))
        return await self.clone(Taken(directory=golden, disk=disk))

    async def adopt(self, running: Running) -> Running:
        """Let go of a machine and take hold of it again, as the next agent does."""
        await running.machine.aclose()
        plan = dataclasses.replace(running.plan, volume=self.storage.volume(running.plan.directory))
        machine = await self.vmm.adopt(running.machine.ref, plan, running.memory)
        self._machines.append(machine)
        return Running(machine=machine, plan=running.plan)

    async def checkpoint(self, running: Running, into: Path | None = None) -> Taken:
        """Capture memory and disk at one instant, in the order the core does; the machine runs on."""
        into = into or self.data_dir / "checkpoints" / f"c{next(self._numbers)}"
        (into / "disk").mkdir(parents=True)
        machine = running.machine
        prepared = await self.storage.prepare_freeze(self.volume(running), into / "disk")
        await machine.prepare_pause(None)
        await machine.pause()
        capture = await machine.capture(into)
        disk = await self.storage.freeze(prepared, machine)
        await machine.resume()
        await capture.finish()
        return Taken(directory=into, disk=disk)

    def volume(self, running: Running) -> Volume:
        """Return the machine's disk as it is now."""
        return self.storage.volume(running.plan.directory)

    def processes(self) -> dict[int, str]:
        """Return the living VMM processes of this test."""
        return marked_processes(self.data_dir)

    async def close(self) -> None:
        """End every machine, and print what the guests and VMMs said last: pytest shows it beside a failure."""
        for words in sorted(self.data_dir.glob("vms/*/*.log")):
            said = words.read_bytes()[-_LAST_WORDS_BYTES:].decode(errors="replace")
            print(f"--- {words.relative_to(self.data_dir)}\n{said}")  # noqa: T201
        with trio.move_on_after(_CLOSE_SECS, shield=True):
            for machine in self._machines:
                await machine.kill()
                await machine.aclose()

    # --- guests ----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def guest(self, running: Running) -> AsyncIterator[Guest]:
        """Attach to the guest agent."""
        with trio.fail_after(ANSWER_SECS) as scope:
            async with (
                open_console(running.machine, running.plan.directory) as console,
                self.exec_backend.connect(running.machine, console) as guest,
            ):
                scope.deadline = math.inf
                yield guest

    async def run(self, running: Running, *argv: str) -> Finished:
        """Run a command to its end, over a connection of its own."""
        async with self.guest(running) as guest:
            return await run(guest, *argv)

    async def start_counter(self, running: Running, path: str, *, ignore_term: bool = False) -> None:
        """Start a process that counts in *path* for ever, and return once it does."""
        async with self.guest(running) as guest:
            await guest.start(ExecRequest(argv=self.counter(path, ignore_term)))
            await counted(guest, path, beyond=0)

    async def count(self, running: Running, path: str) -> int:
        """Return the number in *path*."""
        async with self.guest(running) as guest:
            return await read_count(guest, path)

    async def count_beyond(self, running: Running, path: str, beyond: int) -> int:
        """Wait until the number in *path* is greater than *beyond*, and return it."""
        async with self.guest(running) as guest:
            return await counted(guest, path, beyond)

    async def write(self, running: Running, path: str, text: str) -> None:
        """Write a file in the guest."""
        async with self.guest(running) as guest:
            finished = await run(guest, "tee", path, stdin=text.encode())
            assert finished.status == 0, finished

    async def read(self, running: Running, *paths: str) -> str:
        """Return the content of files in the guest."""
        finished = await self.run(running, "cat", *paths)
        assert finished.status == 0, finished
        return finished.stdout.decode()


def identity(hostname: str, unix_ns: int) -> Identity:
    """Return an identity with randomness of its own."""
    return Identity(hostname=hostname, machine_id=os.urandom(16).hex(), unix_ns=unix_ns, entropy=os.urandom(64))


async def run(guest: Guest, *argv: str, stdin: bytes | None = None, **request: Any) -> Finished:
    """Run a command to its end, feeding *stdin* meanwhile."""
    wanted = dataclasses.replace(ExecRequest(argv=argv, stdin=stdin is not None), **request)
    with trio.fail_after(ANSWER_SECS):
        process = await guest.start(wanted)
        written = {1: bytearray(), 2: bytearray()}
        async with trio.open_nursery() as nursery:
            if stdin is not None:

                async def feed(data: bytes = stdin) -> None:
                    await process.send_stdin(data)
                    await process.close_stdin()

                nursery.start_soon(feed)
            while isinstance(said := await process.receive(), OutputChunk):
                written[said.stream] += said.data
        await guest.release(process)
    assert isinstance(said, ProcessExit), said  # nothing is missing in what one reads from the start
    return Finished(end=said, stdout=bytes(written[1]), stderr=bytes(written[2]))


async def read_count(guest: Guest, path: str) -> int:
    """Return the number a counter keeps in *path*; 0 before it began."""
    return int((await run(guest, "cat", path)).stdout or b"0")


async def counted(guest: Guest, path: str, beyond: int) -> int:
    """Wait until the counter of *path* is beyond a number. Each look is a round trip, so this is no busy loop."""
    with trio.fail_after(ANSWER_SECS):
        while (number := await read_count(guest, path)) <= beyond:
            await run(guest, "sleep", f"{TICK_SECS}")
    return number


def ticks_within(secs: float) -> int:
    """Return how often a counter can have counted in that time at most."""
    return math.ceil(secs / TICK_SECS) + 1


def _fields(plan: MachinePlan) -> dict[str, Any]:
    return {item.name: getattr(plan, item.name) for item in dataclasses.fields(plan)}
