"""The real Firecracker with a guest of 19 bytes that counts: it runs also where a Linux would take minutes to boot."""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio
from noid_vmm_firecracker.backend import FirecrackerBackend
from noid_vmm_firecracker.machine import FirecrackerMachine
from noid_vmm_firecracker.probe import Found
from noid_vmm_firecracker.versions import parsed

from noid.core.backends import LaunchPlan, MachinePlan, RestorePlan
from noid.core.model.sandbox import SandboxMode, SandboxSettings
from noid.core.model.storage import Volume
from noid.errors import BackendError
from noid.vmmhost.sandbox import opened

pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("no_leaks")]

ADDRESS, COUNTER_AT, MEM_MIB = 0x100_0000, 0x110_0000, 128
BOUND_SECS = 30.0
_COUNT = bytes.fromhex(
    "48 ff 04 25 00 00 10 01"  # inc qword [COUNTER_AT]
    "b9 10 27 00 00"  # mov ecx, 10000
    "ff c9"  # dec ecx
    "75 fc"  # jnz to the dec
    "eb ed"  # jmp to the inc
)

PlanT = TypeVar("PlanT", bound=MachinePlan)


def counting_kernel() -> bytes:
    size = len(_COUNT)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, 62, 1, ADDRESS, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 7, 0x1000, ADDRESS, ADDRESS, size, size, 0x1000)
    return (header + segment).ljust(0x1000, b"\0") + _COUNT


def counted(memory: Path) -> int:
    with memory.open("rb") as file:
        file.seek(COUNTER_AT)
        return int(struct.unpack("<Q", file.read(8))[0])


class Bench:
    """Makes plans and ends what was started."""

    def __init__(self, backend: FirecrackerBackend, root: Path) -> None:
        self.backend = backend
        self.root = root
        self.machines: list[FirecrackerMachine] = []
        (root / "kernel").write_bytes(counting_kernel())
        (root / "initrd").write_bytes(bytes(100))

    def plan(self, kind: type[PlanT], name: str, **fields: Any) -> PlanT:
        directory, run_dir = self.root / "vms" / name, self.root / "run" / name
        directory.mkdir(parents=True)
        run_dir.mkdir(parents=True)
        (directory / "disk.raw").write_bytes(bytes(1 << 20))
        volume = Volume(directory=directory, format="raw", top="disk.raw", files=("disk.raw",))
        return kind(
            instance=name, directory=directory, run_dir=run_dir, data_dir=self.root, cpus=1, mem_mib=MEM_MIB,
            volume=volume, lease=None, **fields,
        )  # fmt: skip

    async def launch(self, name: str) -> tuple[FirecrackerMachine, LaunchPlan]:
        plan = self.plan(LaunchPlan, name, kernel=self.root / "kernel", initrd=self.root / "initrd")
        return self.hold(await self.backend.launch(plan)), plan

    async def restore(self, name: str, taken: Path) -> FirecrackerMachine:
        memory = self.root / "vms" / name / "memory"
        plan = self.plan(RestorePlan, name, memory=memory, state=taken / "state")
        memory.hardlink_to(taken / "memory")
        return self.hold(await self.backend.restore(plan))

    def hold(self, machine: FirecrackerMachine) -> FirecrackerMachine:
        self.machines.append(machine)
        return machine

    async def checkpoint(self, machine: FirecrackerMachine, name: str, beyond: int = 0) -> tuple[Path, int]:
        """Take checkpoints until one has counted *beyond* a number; return it and what changed."""
        number = 0
        while True:
            number += 1
            (into := self.root / f"{name}.{number}").mkdir()
            await machine.prepare_pause(None)
            await machine.pause()
            capture = await machine.capture(into)
            await machine.resume()
            await capture.finish()
            if counted(into / "memory") > beyond:
                return into, capture.changed_bytes


@pytest.fixture
def program() -> str:
    program = os.environ.get("NOID_FIRECRACKER")
    if program is None:
        pytest.skip("no Firecracker: NOID_FIRECRACKER is not set to the path of one")
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no /dev/kvm that could be opened")
    return program


@pytest.fixture(params=[SandboxMode.OFF, SandboxMode.FULL])
async def bench(request: pytest.FixtureRequest, data_dir: Path, program: str, no_leaks: None) -> AsyncIterator[Bench]:
    del no_leaks
    if request.param is SandboxMode.FULL and os.geteuid() != 0:
        pytest.skip("needs root")
    said = await trio.run_process([program, "--version"], capture_stdout=True)
    version = parsed(said.stdout.decode())
    assert version is not None
    async with opened(SandboxSettings(mode=request.param), data_dir, data_dir) as sandbox:
        bench = Bench(FirecrackerBackend(Found(path=program, version=version, kvm_refusal=""), sandbox), data_dir)
        yield bench
        for machine in bench.machines:
            await machine.kill()
            await machine.aclose()


async def test_checkpoints_hold_what_changed_and_clones_count_on(bench: Bench) -> None:
    with trio.fail_after(BOUND_SECS):
        machine, _ = await bench.launch("source")
        first, _ = await bench.checkpoint(machine, "first")
        second, changed_bytes = await bench.checkpoint(machine, "second", beyond=counted(first / "memory"))
        clone = await bench.restore("clone", second)
        third, _ = await bench.checkpoint(clone, "third", beyond=counted(second / "memory"))

    assert changed_bytes <= 64 << 10
    assert (third / "memory").stat().st_size == MEM_MIB << 20
    assert counted(first / "memory") < counted(second / "memory") < counted(third / "memory")


async def test_what_a_discarded_capture_has_taken_is_in_the_next_one_also_for_another_agent(bench: Bench) -> None:
    with trio.fail_after(BOUND_SECS):
        machine, plan = await bench.launch("source")
        await bench.checkpoint(machine, "counting")
        await machine.pause()
        (await machine.capture(bench.root)).discard()
        capture = await machine.capture(bench.root)
        await capture.finish()
        taken = counted(bench.root / "memory")
        (await machine.capture(bench.root)).discard()
        await machine.aclose()

        adopted = bench.hold(await bench.backend.adopt(machine.ref, plan, plan.directory / "memory"))
        into = bench.root / "adopted"
        into.mkdir()
        await (await adopted.capture(into)).finish()  # it is paused still

    assert taken > 0
    assert (into / "memory").read_bytes() == (bench.root / "memory").read_bytes()


async def test_a_state_cut_short_is_refused_in_firecrackers_words_and_leaves_no_process(bench: Bench) -> None:
    machine, _ = await bench.launch("source")
    taken, _ = await bench.checkpoint(machine, "taken")
    os.truncate(taken / "state", 5000)

    with trio.fail_after(BOUND_SECS), pytest.raises(BackendError, match="bitcode"):
        await bench.restore("clone", taken)


async def test_two_machines_cannot_write_one_disk(bench: Bench) -> None:
    _, plan = await bench.launch("source")
    other = bench.plan(LaunchPlan, "other", kernel=plan.kernel, initrd=plan.initrd)

    with pytest.raises(BackendError, match="in use"):
        await bench.backend.launch(dataclasses.replace(other, volume=plan.volume))
