"""Starts QEMU, continues captures with it, and takes hold of what an earlier agent started."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

import trio

from noid.core.backends import AgentContext, LaunchPlan, MachinePlan, RestorePlan, VmmFeatures
from noid.core.model.sandbox import SandboxSettings
from noid.core.model.storage import LAYERS
from noid.core.model.vms import ProcessRef
from noid.errors import BackendError, ConfigError, DependencyDown, NoidError, NoSpace
from noid.hostfs import free_bytes, os_errors
from noid.vmmhost import console_line
from noid.vmmhost.enclosure import SYSTEM, Enclosure, Room
from noid.vmmhost.facts import FINGERPRINT_VARIABLE, difference, disk_bytes, host_cpu, make_sparse, said_since
from noid.vmmhost.limits import Shape
from noid.vmmhost.process import VmmProcess
from noid.vmmhost.sandbox import Sandbox, opened
from noid.vmmhost.taps import TAP, busy_tap, check_tap, tap_of
from noid_vmm_qemu.capture import MEMORY_NAME
from noid_vmm_qemu.command_line import (
    DEVICE_SETS,
    GENERATION_ID_MACHINES,
    MACHINES,
    READONLY_RAM_SINCE,
    Descriptors,
    Host,
    cpu_model,
    launch_argv,
    restore_argv,
)
from noid_vmm_qemu.machine import MachineEvents, QemuMachine, connected
from noid_vmm_qemu.probe import missing, probe, version_text
from noid_vmm_qemu.qmp import Qmp
from noid_vmm_qemu.tsc import tsc_khz

QMP_SOCKET = "qmp.sock"
CHANNEL_SOCKET = "agent.sock"
LOG_NAME = "vmm.log"
_ACCELERATORS = ("auto", "kvm", "tcg")
_ADOPT_SECS = 5.0
_CLEANUP_SECS = 5.0
_FULL_BYTES = 4 << 20
#: What emulation may take for translated code, at most.
_EMULATOR_MIB = 1280
#: Where QEMU's user network finds the name server that it shows to guests.
_RESOLVER = (Path("/etc/resolv.conf"),)
_PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "QEMU_MODULE_DIR", "TMPDIR")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuConfig:
    """``[plugins.vmm_qemu]``.

    Attributes:
        accelerator: ``auto`` (KVM where it works, else emulation), ``kvm`` or ``tcg``.
        machine: ``microvm``, or ``q35`` for guests that need PCI. A checkpoint belongs to one of them.
        binary: QEMU's program, by name or path.
    """

    accelerator: str = "auto"
    machine: str = "microvm"
    binary: str = "qemu-system-x86_64"


@contextlib.asynccontextmanager
async def open_backend(config: QemuConfig, context: AgentContext) -> AsyncIterator[QemuBackend]:
    """Find out what QEMU can do here and offer it. Closing it leaves every VM running.

    Raises:
        ConfigError: a setting has no such value, or KVM is demanded and does not work.
        DependencyDown: QEMU is missing, broken or too old.
    """
    if config.accelerator not in _ACCELERATORS:
        raise ConfigError(f"[plugins.vmm_qemu] accelerator is {config.accelerator!r}; use {_listed(_ACCELERATORS)}.")
    if config.machine not in MACHINES:
        raise ConfigError(f"[plugins.vmm_qemu] machine is {config.machine!r}; use {_listed(tuple(MACHINES))}.")
    abilities = await probe(config.binary, context.run_dir, try_kvm=config.accelerator != "tcg")
    accelerator = "tcg" if config.accelerator == "tcg" or abilities.kvm_refusal else "kvm"
    if config.accelerator == "kvm" and abilities.kvm_refusal:
        raise ConfigError(
            f'[plugins.vmm_qemu] accelerator is "kvm", but KVM does not work here: {abilities.kvm_refusal}. '
            'Use "auto" to fall back to emulation.'
        )
    if config.accelerator == "auto" and abilities.kvm_refusal:
        log.info("VMs are emulated, because KVM does not work here: %s", abilities.kvm_refusal)
    host = Host(
        binary=config.binary,
        version=abilities.version,
        accelerator=accelerator,
        machine=config.machine,
        sandbox=abilities.sandbox,
        tsc_khz=await trio.to_thread.run_sync(tsc_khz) if accelerator == "tcg" else 0,
    )
    async with opened(context.sandbox, context.data_dir, context.run_dir) as sandbox:
        yield QemuBackend(host, sandbox)


class QemuBackend:
    """`noid.core.backends.VmmBackend` on QEMU. *host* is what every machine is made for, *sandbox* what it runs in."""

    name = "qemu"

    def __init__(self, host: Host, sandbox: Sandbox | None = None) -> None:
        self.features = VmmFeatures(
            accelerator=host.accelerator,
            disk_formats=frozenset({"raw", "qcow2", LAYERS}),
            disk_pivot=True,
            network_kinds=frozenset({"none", "user", TAP}),
            vm_generation_id=host.machine in GENERATION_ID_MACHINES,
        )
        self.host = host
        self._sandbox = sandbox or Sandbox(SandboxSettings())
        # An older QEMU opens a guest's memory for writing, which no user of a VM may: images are everybody's. So it
        # opens it as root, which it ceases to be before it has heard a word of the guest.
        self._becomes_user = host.version[:2] < READONLY_RAM_SINCE
        self._fingerprint = {
            "vmm": "qemu",
            "version": version_text(host.version),
            "accelerator": host.accelerator,
            "machine": host.machine,
            "cpu": cpu_model(host.accelerator) + (f" {host_cpu()}" if host.accelerator == "kvm" else ""),
            "devices": DEVICE_SETS[host.machine],
        }

    def fingerprint(self) -> Mapping[str, str]:
        """See `VmmBackend.fingerprint`."""
        return dict(self._fingerprint)

    async def launch(self, plan: LaunchPlan) -> QemuMachine:
        """See `VmmBackend.launch`. Makes ``directory/memory``, sparse: the parent of its captures."""
        memory = plan.directory / MEMORY_NAME
        with os_errors("making the memory file of a VM"):
            make_sparse(memory, plan.mem_mib << 20)

        async def boot(qmp: Qmp, _: MachineEvents) -> None:
            status = (await qmp.execute("query-status"))["status"]
            if status != "running":
                raise BackendError(f"QEMU is {status!r} after its start")

        async with self._enclosed(plan, memory) as enclosure:
            with (
                os_errors("lending a VM its kernel"),
                enclosure.lent(plan.kernel) as kernel,
                enclosure.lent(plan.initrd) as initrd,
            ):
                lent = dataclasses.replace(plan, kernel=kernel, initrd=initrd)

                def argv(fds: Descriptors) -> list[str]:
                    return launch_argv(self.host, lent, memory, fds, runas=self._runas(enclosure))

                return await self._start(plan, memory, enclosure, argv, None, boot)

    async def restore(self, plan: RestorePlan) -> QemuMachine:
        """See `VmmBackend.restore`."""
        with os_errors("opening the device state of a checkpoint"):
            state_fd = os.open(plan.state, os.O_RDONLY | os.O_CLOEXEC)

        async def load(qmp: Qmp, events: MachineEvents) -> None:
            # Events first, then the load: a machine that cannot get its disk's lock stays paused without a word on
            # QMP but that the migration "completed". Polling for the good end would never see the bad one.
            events_on = {"capabilities": [{"capability": "events", "state": True}]}
            await qmp.execute("migrate-set-capabilities", events_on)
            await qmp.execute("migrate-incoming", {"uri": f"fd:{state_fd}"})
            await qmp.event(lambda: events.migration in ("completed", "failed"))
            if not events.resumed:
                status = (await qmp.execute("query-status"))["status"]
                wanted = "paused" if plan.paused else "running"
                if status != wanted:
                    raise BackendError(f"QEMU loaded the checkpoint but is {status!r} instead of {wanted}")
                events.adopt(paused=plan.paused)

        try:
            async with self._enclosed(plan, plan.memory) as enclosure:

                def argv(fds: Descriptors) -> list[str]:
                    return restore_argv(self.host, plan, fds, runas=self._runas(enclosure))

                return await self._start(plan, plan.memory, enclosure, argv, state_fd, load)
        finally:
            os.close(state_fd)

    async def adopt(self, ref: ProcessRef, plan: MachinePlan, memory: Path) -> QemuMachine:
        """See `VmmBackend.adopt`."""
        process = VmmProcess.adopt(ref)
        events = MachineEvents(plan.instance)
        qmp: Qmp | None = None
        try:
            with trio.move_on_after(_ADOPT_SECS):
                qmp = Qmp(await connected(str(plan.run_dir / QMP_SOCKET)), events.note)
                await qmp.negotiate()
                status = (await qmp.execute("query-status"))["status"]
                events.adopt(paused=status != "running")
                enclosure = self._sandbox.adopt(plan.instance, plan.directory, ref.pid)
                foreign = difference(self._fingerprint, ref.pid)
                return self._machine(plan, process, qmp, events, memory, enclosure, foreign)
            raise DependencyDown(
                f"VM process {ref.pid} is alive but did not answer within {_ADOPT_SECS:.0f} s; it may be stuck, or "
                "another noid-server holds it."
            )
        except BaseException:
            process.close()
            if qmp is not None:
                with trio.move_on_after(_CLEANUP_SECS, shield=True):
                    await qmp.aclose()
            raise

    def _enclosed(self, plan: MachinePlan, memory: Path) -> AbstractAsyncContextManager[Enclosure]:
        with os_errors("looking at the disk of a VM"):
            shape = Shape(
                cpus=plan.cpus,
                mem_mib=plan.mem_mib,
                disk_bytes=disk_bytes(plan.volume.path, plan.volume.format),
                vmm_mib=_EMULATOR_MIB if self.host.accelerator == "tcg" else 0,
            )
        layers = [plan.volume.directory / name for name in plan.volume.files]
        shared = [path for path in layers if path != plan.volume.path]
        own = [plan.volume.path]
        return self._sandbox.enclosed(plan.instance, plan.directory, shape, own=own, shared=[*shared, memory])

    def _runas(self, enclosure: Enclosure) -> str:
        return enclosure.user if enclosure.is_room and self._becomes_user else ""

    def _room(self, plan: MachinePlan, binary: Path) -> Room:
        connected = plan.lease is not None and plan.lease.kind != "none"
        tun = ("net/tun",) if tap_of(plan.lease) else ()
        return Room(
            read=(*SYSTEM, binary, *(_RESOLVER if connected else ())),
            write=(plan.directory,),
            devices=("null", "urandom", *tun, *(("kvm",) if self.host.accelerator == "kvm" else ())),
            connected=connected,
            becomes_user=self._becomes_user,
        )

    async def _start(
        self,
        plan: MachinePlan,
        memory: Path,
        enclosure: Enclosure,
        argv: Callable[[Descriptors], list[str]],
        state_fd: int | None,
        set_off: Callable[[Qmp, MachineEvents], Awaitable[None]],
    ) -> QemuMachine:
        """Spawn QEMU and let *set_off* bring it to run. Whatever fails or is cancelled: no process is left."""
        binary = shutil.which(self.host.binary)
        if binary is None:
            raise DependencyDown(missing(self.host.binary))
        check_tap(plan.lease)
        log_path = plan.directory / LOG_NAME
        console = plan.directory / console_line.CONSOLE_LOG, plan.run_dir / console_line.CONSOLE_INPUT
        with (
            os_errors("starting QEMU"),
            _listening(plan.run_dir) as sockets,
            console_line.opened(*console) as line,
        ):
            logged_bytes = log_path.stat().st_size if log_path.exists() else 0
            inherited = dataclasses.astuple(sockets) + (() if state_fd is None else (state_fd,))
            try:
                process = VmmProcess.spawn(
                    enclosure.command([binary, *argv(sockets)[1:]], self._room(plan, Path(binary))),
                    environment=self._environment(plan),
                    stdin=line.stdin,
                    stdout=line.stdout,
                    log_path=log_path,
                    pass_fds=inherited,
                )
            except FileNotFoundError as error:
                raise DependencyDown(missing(self.host.binary)) from error
        qmp: Qmp | None = None
        events = MachineEvents(plan.instance)
        enclosure.enter(process.ref.pid)
        try:
            # The socket has been listening since before the process began, so connecting needs no patience.
            qmp = Qmp(await connected(str(plan.run_dir / QMP_SOCKET)), events.note)
            version = await qmp.negotiate()
            if version != version_text(self.host.version):
                raise BackendError(
                    f"QEMU is now version {version}, but was {version_text(self.host.version)} when noid-server "
                    "started. Restart noid-server"
                )
            await set_off(qmp, events)
        except NoidError as error:
            await _end(process, qmp)
            said = said_since(log_path, logged_bytes)
            if free_bytes(plan.directory) < _FULL_BYTES:  # writing to mapped memory is then SIGBUS, without a word
                raise NoSpace(
                    f"VM {plan.instance} did not start: the disk of {plan.directory} is full. Free space there and "
                    f"try again. ({error} QEMU's own words: {said})"
                ) from error
            text = f"{busy_tap(plan.lease, said)}{error}"
            raise BackendError(f"VM {plan.instance} did not start: {text} QEMU's own words: {said}") from error
        except BaseException:
            await _end(process, qmp)  # noqa: ASYNC102  # shields itself
            raise
        return self._machine(plan, process, qmp, events, memory, enclosure)

    def _environment(self, plan: MachinePlan) -> dict[str, str]:
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        return environment | {
            "LC_ALL": "C",
            "NOID_INSTANCE": plan.instance,
            "NOID_DATA_DIR": str(plan.data_dir),
            FINGERPRINT_VARIABLE: json.dumps(self._fingerprint),
        }

    def _machine(
        self,
        plan: MachinePlan,
        process: VmmProcess,
        qmp: Qmp,
        events: MachineEvents,
        memory: Path,
        enclosure: Enclosure,
        foreign: str = "",
    ) -> QemuMachine:
        return QemuMachine(
            process=process,
            enclosure=enclosure,
            qmp=qmp,
            events=events,
            channel_path=str(plan.run_dir / CHANNEL_SOCKET),
            memory=memory,
            mem_mib=plan.mem_mib,
            console_input=plan.run_dir / console_line.CONSOLE_INPUT,
            console_log=plan.directory / console_line.CONSOLE_LOG,
            foreign=foreign,
        )


async def _end(process: VmmProcess, qmp: Qmp | None) -> None:
    """Kill a process that nobody has yet, and let go of it. Shielded and bounded."""
    process.send_kill()
    with trio.move_on_after(_CLEANUP_SECS, shield=True):
        if qmp is not None:
            await qmp.aclose()
        await process.wait()
    process.close()


@contextlib.contextmanager
def _listening(run_dir: Path) -> Iterator[Descriptors]:
    """Make a machine's sockets, listening, for a process to inherit; our own copies close again."""
    with contextlib.ExitStack() as stack:
        numbers = []
        for name in (QMP_SOCKET, CHANNEL_SOCKET):
            path = run_dir / name
            path.unlink(missing_ok=True)
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            listener.bind(str(path))
            path.chmod(0o600)
            listener.listen(1)
            numbers.append(listener.fileno())
        yield Descriptors(qmp=numbers[0], channel=numbers[1])


def _listed(names: tuple[str, ...]) -> str:
    return " or ".join(f'"{name}"' for name in names)
