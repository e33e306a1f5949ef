"""``noid bench firecracker``: checkpoint, create and restore beside bare calls of Firecracker's API."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import trio
from noid_vmm_firecracker.machine import API_SOCKET

from noid.core import paths
from noid.core.checkpoints.templates import verified
from noid.core.config.settings import Backends, Config, PoolConfig, SandboxConfig
from noid.core.layout import Layout
from noid.core.model.vms import Vm
from noid.core.plugins import Plugins
from noid.hostfs import write_out
from noid.testing.firecracker import SimulatedFirecracker
from noid.testing.simulated_agent import give_default_image, simulated_config, simulated_plugins
from noid_bench.bare_firecracker import Answer, BareFirecracker, call, connected
from noid_bench.floors import ping
from noid_bench.measures import in_ms, in_pairs, ready, settled
from noid_bench.report import Figure
from noid_bench.rig import Rig, driven, image_to_use, link_image, scratch_directory

_NOISE = ("sh", "-c", "head -c 1000000 /dev/urandom > /dev/shm/noise")
_SIMULATED_NOISE = ("sh", "-c", "echo noise > /dev/shm/noise")
_BARE_START = "bare calls: spawn, load, first answer of the guest"
_BARE_PAUSE = "bare calls: Paused, snapshot (Diff, into memory), the same freeze of the disk, Resumed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What is measured: noid in *rig*, bare calls of *program*, whose guests *answer*, and make *noise* in memory."""

    rig: Rig
    program: str
    answer: Answer
    noise: tuple[str, ...]

    # --- create and restore ----------------------------------------------------------------------------------------

    async def create(self, rounds: int) -> list[Figure]:
        """Create from the golden template until the guest has answered.

        As one meets it, with a machine waiting in the pool, and with the pool empty, as in a burst.
        """
        first = await self.rig.create("golden-first")  # boots the template
        golden = self.rig.layout.golden / (first.origin or "").removeprefix("golden/")
        pairs = await in_pairs(self.rig, rounds, settled, lambda: self._bare_start(golden), self.rig.create)
        await self.rig.agent.destroy_vm(self.rig.user, first.name)
        return [
            Figure(
                name="create from golden, until the guest has answered",
                unit="ms",
                samples=pairs.ready,
                floor=pairs.floor,
                floor_name=_BARE_START,
                must=1.3,
                note="a machine was waiting in the pool, as it does a moment after the create before",
            ),
            Figure(
                name="the same, right after another (pool empty)",
                unit="ms",
                samples=pairs.right_after,
                floor=pairs.floor,
                floor_name=_BARE_START,
            ),
        ]

    async def restore(self, rounds: int) -> list[Figure]:
        """Restore a checkpoint as a new VM until the guest has answered.

        As whoever restores it again meets it, with a copy that stands ready, and without one, as the first does.
        """
        source = await self.rig.create("restore-source")
        checkpoint, directory = await self._checkpoint(source.name)
        await self.rig.fork(source.name, checkpoint, "restored-before")
        await self.rig.agent.destroy_vm(self.rig.user, "restored-before")
        pairs = await in_pairs(
            self.rig,
            rounds,
            ready,
            lambda: self._bare_start(directory),
            lambda name: self.rig.fork(source.name, checkpoint, name),
        )
        await self.rig.agent.destroy_vm(self.rig.user, source.name)
        return [
            Figure(
                name="restore as a new VM, until the guest has answered",
                unit="ms",
                samples=pairs.ready,
                floor=pairs.floor,
                floor_name=_BARE_START,
                must=1.3,
                note="of a checkpoint that was restored before: a copy stands ready, as it does a moment later",
            ),
            Figure(
                name="the same, the first of a checkpoint (no copy stands ready)",
                unit="ms",
                samples=pairs.right_after,
                floor=pairs.floor,
                floor_name=_BARE_START,
            ),
        ]

    async def _bare_start(self, source: Path) -> float:
        directory = self.rig.layout.run("bare")
        directory.mkdir(parents=True)
        machine = BareFirecracker(self.program, directory, self.answer)
        try:
            services = self.rig.agent.services
            frozen = (await verified(services, source)).disk
            machine.prepare(await services.storage.clone(frozen, directory))
            return await trio.to_thread.run_sync(machine.start, source)
        finally:
            machine.end()

    # --- the pause -------------------------------------------------------------------------------------------------

    async def pause(self, rounds: int) -> list[Figure]:
        """How long a checkpoint of a clone makes its guest stand still, and what is written, then and in all."""
        source = await self.rig.create("pause-source")
        checkpoint, _ = await self._checkpoint(source.name)
        samples, floor, inside, bare_inside, total = [], [], [], [], []
        for number in range(rounds):
            vm = await self._noisy(source.name, checkpoint, f"bare-{number}")
            with _written(_pid(vm)) as written:
                floor.append(await self._bare_pause(vm))
            bare_inside.append(written[0])
            await self.rig.agent.destroy_vm(self.rig.user, vm.name)
            vm = await self._noisy(source.name, checkpoint, f"pause-{number}")
            with _written(_pid(vm)) as written, _written(os.getpid()) as by_noid:
                outcome = await self.rig.agent.checkpoints.take(self.rig.user, vm.name, None)
            samples.append(outcome.timings["pause"])
            inside.append(written[0])
            total.append(written[0] + by_noid[0])
            await self.rig.agent.destroy_vm(self.rig.user, vm.name)
        await self.rig.agent.destroy_vm(self.rig.user, source.name)
        return [
            Figure(
                name="checkpoint pause",
                unit="ms",
                samples=in_ms(samples),
                floor=in_ms(floor),
                floor_name=_BARE_PAUSE,
                must=1.1,
            ),
            Figure(
                name="bytes written inside the pause",
                unit="MB",
                samples=tuple(inside),
                floor=tuple(bare_inside),
                floor_name="the bare calls",
                note="by Firecracker: device state and changed memory. The disk's freeze shares blocks or copies them",
            ),
            Figure(
                name="bytes written by a checkpoint in total",
                unit="MB",
                samples=tuple(total),
                note="by Firecracker and by noid: the image where blocks cannot be shared, manifest, database",
            ),
        ]

    async def _noisy(self, name: str, checkpoint: str, new_name: str) -> Vm:
        """Return a clone that has changed some memory."""
        vm = await self.rig.fork(name, checkpoint, new_name)
        await self.rig.run(new_name, *self.noise)
        await ready(self.rig)  # while the next copy is made, the processor is busy with that
        return vm

    async def _bare_pause(self, vm: Vm) -> float:
        """Checkpoint *vm*, which is lost for noid after that, with nothing but calls and a freeze of its disk."""
        services = self.rig.agent.services
        volume = services.storage.volume(self.rig.directory(vm))
        with _fast_directory() as memory, scratch_directory(self.rig.layout.data_dir) as into:
            (into / "disk").mkdir()
            plan = await services.storage.prepare_freeze(volume, into / "disk")
            await trio.to_thread.run_sync(write_out, volume.path)
            with connected(self.rig.layout.run(vm.instance) / API_SOCKET) as api:
                wanted = {
                    "snapshot_type": "Diff",
                    "snapshot_path": str(into / "state"),
                    "mem_file_path": str(memory / "memory"),
                }
                started = time.perf_counter()
                call(api, "PATCH", "/vm", {"state": "Paused"})
                call(api, "PUT", "/snapshot/create", wanted)
                await services.storage.freeze(plan, None)
                call(api, "PATCH", "/vm", {"state": "Resumed"})
                return time.perf_counter() - started

    async def _checkpoint(self, name: str) -> tuple[str, Path]:
        checkpoint = (await self.rig.agent.checkpoints.take(self.rig.user, name, None)).checkpoint
        if checkpoint is None:
            raise RuntimeError("a checkpoint operation without a checkpoint")
        return checkpoint.id, self.rig.layout.checkpoint(self.rig.user.id, checkpoint.id)


async def measure_firecracker(binary: str | None, image: str | None, rounds: int, parent: Path) -> list[Figure]:
    """Measure with *rounds* samples each, working below *parent*; nothing is left there.

    Without a *binary*, Firecracker and its guest are simulated.

    Raises:
        NotFound: there is no such image.
        DependencyDown: there is no such program, or it cannot run guests here.
    """
    with scratch_directory(parent) as directory:
        opened = _simulated(directory) if binary is None else _real(directory, binary, image)
        async with opened as bench:
            figures = [*await bench.create(rounds), *await bench.restore(rounds)]
            return [*figures, *await bench.pause(rounds)]


@contextlib.asynccontextmanager
async def _real(directory: Path, binary: str, image: str | None) -> AsyncIterator[Bench]:
    images = Layout(paths.data_dir()).images
    name = await trio.to_thread.run_sync(image_to_use, images, image)
    link_image(images / name, Layout(directory).images / name)
    config = Config(
        data_dir=directory,
        local=True,
        backends=Backends(vmm="firecracker", network="none"),
        plugins={"vmm_firecracker": {"binary": binary}},
        sandbox=SandboxConfig(mode="off"),  # as the bare calls have none
    )
    async with driven(config, Plugins(), name) as rig:
        yield Bench(rig=rig, program=binary, answer=ping, noise=_NOISE)


@contextlib.asynccontextmanager
async def _simulated(directory: Path) -> AsyncIterator[Bench]:
    data_dir = directory / "data"
    program = str(SimulatedFirecracker(directory / "program").program)
    give_default_image(data_dir)
    backends = Backends(vmm="firecracker", storage="copy", exec=("simulated",), network="none", auth="token")
    plugins = {"vmm_firecracker": {"binary": program}}
    sandbox = SandboxConfig(mode="off")
    config = simulated_config(data_dir, backends=backends, plugins=plugins, sandbox=sandbox, pool=PoolConfig())
    async with driven(config, simulated_plugins(), "default") as rig:
        yield Bench(rig=rig, program=program, answer=_simulated_ping, noise=_SIMULATED_NOISE)


def _simulated_ping(channel: socket.socket) -> None:
    channel.sendall(json.dumps({"op": "hello", "number": 1}).encode() + b"\n")
    while not channel.recv(65536).endswith(b"\n"):
        pass


def _pid(vm: Vm) -> int:
    if vm.process is None:
        raise RuntimeError("a VM without a process")
    return vm.process.pid


@contextlib.contextmanager
def _written(pid: int) -> Iterator[list[float]]:
    """Yield what is, after the block, the megabytes that process *pid* has written in it, into whatever."""
    before, written = _wchar(pid), [0.0]
    yield written
    written[0] = (_wchar(pid) - before) / 1e6


def _wchar(pid: int) -> int:
    facts = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(facts["wchar"])


@contextlib.contextmanager
def _fast_directory() -> Iterator[Path]:
    """Make a directory in memory, where there is one: a script would do that, too."""
    memory = Path("/dev/shm")  # noqa: S108  # a directory of its own in there
    parent = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=f"noid-bench-{secrets.token_hex(3)}-", dir=parent) as directory:
        yield Path(directory)
