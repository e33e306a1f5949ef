"""Starts Firecracker, continues snapshots with it, and takes hold of what an earlier agent started.

Each machine's Firecracker works in a directory of its own, the run directory, and knows its disk, its sockets and
nothing else by names relative to it: ``disk``, ``v.sock``. The names are in the snapshot, and mean the clone's own
things wherever it is continued.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import trio

from noid.core.backends import AgentContext, LaunchPlan, MachinePlan, RestorePlan, VmmFeatures
from noid.core.model.sandbox import SandboxSettings
from noid.core.model.storage import LAYERS
from noid.core.model.vms import ProcessRef
from noid.errors import BackendError, DependencyDown, InvalidRequest, NoidError, NoSpace, Unsupported
from noid.hostfs import free_bytes, os_errors
from noid.vmmhost import console_line
from noid.vmmhost.enclosure import Enclosure, Room
from noid.vmmhost.facts import FINGERPRINT_VARIABLE, difference, host_cpu, make_sparse, said_since
from noid.vmmhost.limits import Shape
from noid.vmmhost.process import VmmProcess
from noid.vmmhost.sandbox import Sandbox, opened
from noid.vmmhost.taps import busy_tap, check_tap, tap_of
from noid_vmm_firecracker.api import SNAPSHOT_SECS, FirecrackerApi, Refused
from noid_vmm_firecracker.machine import API_SOCKET, LOG_NAME, VSOCK_SOCKET, FirecrackerMachine, Places
from noid_vmm_firecracker.memory import MEMORY_NAME, Lineage
from noid_vmm_firecracker.probe import Found, probe
from noid_vmm_firecracker.versions import CLOCK_REALTIME_SINCE, abilities, shown

DEVICE_SET = "1"
"""Of what a guest sees: whoever changes that raises it, and checkpoints of before are refused."""
DISK_NAME = "disk"
BASE_NAME = "base"
BASE_ARGUMENT = "noid.base=/dev/vdb"
"""Where the guest finds the second disk of `LAYERS`; the first is the root device, ``/dev/vda``."""
CARD_NAME = "net0"
GUEST_CID = 3
KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet reboot=k panic=-1 mitigations=off cryptomgr.notests random.trust_cpu=on tsc=reliable "
    "i8042.noaux i8042.nomux i8042.dumbkbd"
)
START_SECS = 10.0
ADOPT_SECS = 5.0

_LISTEN_LOOK_SECS = 0.001
_CLEANUP_SECS = 5.0
_NEXT_STEPS = {
    "PUT /actions": " Check the image's kernel, or give the VM more memory.",
    "PUT /snapshot/load": " If it goes on, this checkpoint is damaged: restore another one.",
}
_FULL_BYTES = 4 << 20
_ROOM_MIB = 64
_PASSED_ON = ("PATH", "TMPDIR")
_NO_CLOCK = "clock_realtime requested but not present"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FirecrackerConfig:
    """``[plugins.vmm_firecracker]``.

    Attributes:
        binary: Firecracker's program, by name or path.
        track_dirty_pages: Let KVM note which pages a guest writes. Checkpoints then hold what changed since the last
            one; without, every page that was ever touched, and the guest writes a little faster.
        clock_realtime: Let a guest's clocks, the monotonic one too, jump by the age of its checkpoint when it wakes:
            for roots without our agent, which sets the time of day alone. Every timer that ran is over then.
    """

    binary: str = "firecracker"
    track_dirty_pages: bool = True
    clock_realtime: bool = False


@contextlib.asynccontextmanager
async def open_backend(config: FirecrackerConfig, context: AgentContext) -> AsyncIterator[FirecrackerBackend]:
    """Find out whether Firecracker can run a guest here, and offer it. Closing it leaves every VM running.

    Raises:
        DependencyDown: Firecracker is missing, broken or too old, or KVM does not work.
    """
    found = await probe(config.binary, context.run_dir)
    if found.kvm_refusal:
        raise DependencyDown(
            f"Firecracker cannot run a guest here, because KVM does not work: {found.kvm_refusal}. "
            'QEMU can, without KVM: [backends] vmm = "qemu".'
        )
    if config.clock_realtime and not abilities(found.version).clock_realtime:
        raise DependencyDown(
            f"Firecracker {shown(found.version)} has no clock_realtime, which came with {shown(CLOCK_REALTIME_SINCE)}. "
            "Install a newer one, or leave that out of [plugins.vmm_firecracker] in server.toml."
        )
    async with opened(context.sandbox, context.data_dir, context.run_dir) as sandbox:
        yield FirecrackerBackend(
            found, sandbox, track_dirty_pages=config.track_dirty_pages, clock_realtime=config.clock_realtime
        )


class FirecrackerBackend:
    """`noid.core.backends.VmmBackend` on Firecracker."""

    name = "firecracker"

    def __init__(
        self,
        found: Found,
        sandbox: Sandbox | None = None,
        *,
        track_dirty_pages: bool = True,
        clock_realtime: bool = False,
    ) -> None:
        self.features = VmmFeatures(
            accelerator="kvm",
            disk_formats=frozenset({"raw", LAYERS}),
            disk_pivot=False,
            network_kinds=frozenset({"none", "tap"}),
            vm_generation_id=True,
            capture_cuts_channel=True,
        )
        self._found = found
        self._sandbox = sandbox or Sandbox(SandboxSettings())
        # Only a snapshot of a host that keeps its time by the TSC holds the time; the first one that does not, tells.
        self._sets_clock = clock_realtime
        self._track = track_dirty_pages
        self._fingerprint = {
            "vmm": "firecracker",
            "version": shown(found.version),
            "accelerator": "kvm",
            "cpu": host_cpu(),
            "devices": DEVICE_SET,
        }

    def fingerprint(self) -> Mapping[str, str]:
        """See `VmmBackend.fingerprint`."""
        return dict(self._fingerprint)

    async def launch(self, plan: LaunchPlan) -> FirecrackerMachine:
        """See `VmmBackend.launch`. Makes ``directory/memory``, sparse: the image its first checkpoint lies over."""
        if "\n" in plan.cmdline or "\0" in plan.cmdline:
            raise InvalidRequest("the kernel command line contains a line break or a NUL byte.")
        memory = plan.directory / MEMORY_NAME
        with os_errors("making the memory file of a VM"):
            make_sparse(memory, plan.mem_mib << 20)

        async def boot(api: FirecrackerApi, enclosure: Enclosure) -> None:
            base = plan.volume.base_path
            layered = "" if base is None else BASE_ARGUMENT
            arguments = " ".join(filter(None, (KERNEL_ARGUMENTS, layered, plan.cmdline.strip())))
            await api.machine_config(cpus=plan.cpus, mem_mib=plan.mem_mib, track_dirty_pages=self._track)
            with (
                os_errors("lending a VM its kernel"),
                enclosure.lent(plan.kernel) as kernel,
                enclosure.lent(plan.initrd) as initrd,
            ):  # Firecracker opens them now, and reads them when it starts
                await api.boot_source(kernel=kernel, initrd=initrd, arguments=arguments)
            await api.drive(DISK_NAME, DISK_NAME, is_root=True)
            if base is not None:
                await api.drive(BASE_NAME, BASE_NAME, is_read_only=True)
            for card, tap in _taps(plan).items():
                await api.network_interface(card, tap, plan.lease.mac if plan.lease else None)
            await api.vsock(VSOCK_SOCKET, guest_cid=GUEST_CID)
            await api.entropy()
            await api.start()

        return await self._start(plan, memory, boot)

    async def restore(self, plan: RestorePlan) -> FirecrackerMachine:
        """See `VmmBackend.restore`."""
        if self._sets_clock:
            try:
                return await self._start(plan, plan.memory, functools.partial(self._load, plan, clock_realtime=True))
            except BackendError as error:
                if not (isinstance(error.__cause__, Refused) and _NO_CLOCK in error.__cause__.words):
                    raise
                # The process is gone with the refusal, but nothing has run: what is left is to begin again.
                log.info("snapshots of this host hold no time; clones hear it from their guest agent alone")
                self._sets_clock = False
        return await self._start(plan, plan.memory, functools.partial(self._load, plan, clock_realtime=False))

    async def _load(
        self, plan: RestorePlan, api: FirecrackerApi, enclosure: Enclosure, *, clock_realtime: bool
    ) -> None:
        with os_errors("lending a VM the state of a checkpoint"), enclosure.lent(plan.state) as state:
            await api.load_snapshot(
                state=state,
                memory=plan.memory,
                track_dirty_pages=self._track,
                taps=_taps(plan),
                clock_realtime=clock_realtime,
            )

    async def adopt(self, ref: ProcessRef, plan: MachinePlan, memory: Path) -> FirecrackerMachine:
        """See `VmmBackend.adopt`."""
        del memory  # what its next checkpoint lies over, the VM's directory says
        process = VmmProcess.adopt(ref)
        api = FirecrackerApi(plan.run_dir / API_SOCKET)
        lineage = Lineage(plan.directory, plan.mem_mib << 20, tracked=self._track)
        patience_secs = SNAPSHOT_SECS if lineage.may_be_capturing else ADOPT_SECS
        try:
            with trio.move_on_after(patience_secs):
                paused = await api.state(patience_secs) == "Paused"
                with os_errors("opening the memory image of a VM"):
                    lineage.adopt()
                foreign = difference(self._fingerprint, ref.pid)
                return FirecrackerMachine(
                    process=process,
                    enclosure=self._sandbox.adopt(plan.instance, plan.directory, ref.pid),
                    api=api,
                    places=_places(plan),
                    memory=lineage,
                    paused=paused,
                    foreign=foreign,
                )
            raise DependencyDown(
                f"VM process {ref.pid} is alive but did not answer within {patience_secs:g} s; it may be stuck."
            )
        except BaseException:
            process.close()
            lineage.close(is_over=True)
            with trio.move_on_after(_CLEANUP_SECS, shield=True):
                await api.aclose()
            raise

    async def _start(
        self, plan: MachinePlan, memory: Path, set_off: Callable[[FirecrackerApi, Enclosure], Awaitable[None]]
    ) -> FirecrackerMachine:
        """Spawn Firecracker and let *set_off* bring it to run. Whatever fails or is cancelled: no process is left."""
        base, log_path = plan.volume.base_path, plan.directory / LOG_NAME
        with os_errors("looking at the files of a VM"):
            log_path.touch(0o600)  # Firecracker opens it itself
            # A checkpoint's pause holds what has changed in memory: that much again, at most.
            size = plan.volume.path.stat().st_size
            shape = Shape(cpus=plan.cpus, mem_mib=plan.mem_mib, disk_bytes=size, vmm_mib=plan.mem_mib)
        async with self._sandbox.enclosed(
            plan.instance,
            plan.directory,
            shape,
            own=[plan.volume.path, plan.run_dir, log_path],
            shared=[memory, *([base] if base else [])],
        ) as enclosure:
            return await self._start_in(enclosure, plan, memory, set_off)

    def _room(self, plan: MachinePlan) -> Room:
        connected = bool(_taps(plan))
        return Room(
            read=(Path(self._found.path).absolute(),),
            write=(plan.directory, plan.run_dir),
            devices=("kvm", "null", "urandom", *(("net/tun",) if connected else ())),
            connected=connected,
            memory_kib=(plan.mem_mib + _ROOM_MIB) << 10,
        )

    async def _start_in(
        self,
        enclosure: Enclosure,
        plan: MachinePlan,
        memory: Path,
        set_off: Callable[[FirecrackerApi, Enclosure], Awaitable[None]],
    ) -> FirecrackerMachine:
        if plan.volume.format not in self.features.disk_formats:
            raise Unsupported(self.name, f"open {plan.volume.format} disks")
        check_tap(plan.lease)
        places = _places(plan)
        logged_bytes = places.vmm_log.stat().st_size if places.vmm_log.exists() else 0
        with (
            os_errors("starting Firecracker"),
            _locked(plan.volume.path) as disk_fd,
            console_line.opened(places.console_log, plan.run_dir / console_line.CONSOLE_INPUT) as line,
        ):
            _clear(plan)
            try:
                process = VmmProcess.spawn(
                    enclosure.command(self._argv(plan, places.vmm_log), self._room(plan), directory=plan.run_dir),
                    environment=self._environment(plan),
                    stdin=line.stdin,
                    stdout=line.stdout,
                    log_path=places.vmm_log,
                    pass_fds=(disk_fd,),
                    directory=plan.run_dir,
                )
            except FileNotFoundError as error:
                raise DependencyDown(f"{self._found.path} is not there any more. Install Firecracker again.") from error
        api = FirecrackerApi(plan.run_dir / API_SOCKET)
        lineage = Lineage(plan.directory, plan.mem_mib << 20, tracked=self._track)
        enclosure.enter(process.ref.pid)
        stands = isinstance(plan, RestorePlan) and plan.paused

        @contextlib.asynccontextmanager
        async def starting() -> AsyncIterator[None]:
            try:
                yield
            except NoidError as error:
                await _kill(process)  # so that its log has all it had to say
                raise _not_started(plan, error, said_since(places.vmm_log, logged_bytes)) from error

        async def begin() -> None:
            async with starting():
                await set_off(api, enclosure)
                with os_errors("keeping the memory image of a VM"):
                    lineage.begin(memory)

        try:
            async with starting():
                await _answering(process, api)
            if not stands:
                await begin()
        except BaseException:
            await _end(process, api, lineage)  # noqa: ASYNC102  # shields itself
            raise
        return FirecrackerMachine(
            process=process,
            enclosure=enclosure,
            api=api,
            places=places,
            memory=lineage,
            paused=stands,
            # Firecracker's clock for the guest runs on while it is paused, so one that stands is not loaded yet.
            begin=begin if stands else None,
        )

    def _argv(self, plan: MachinePlan, log_path: Path) -> list[str]:
        return [
            str(Path(self._found.path).absolute()),
            *("--id", plan.instance),
            *("--api-sock", API_SOCKET),
            *("--log-path", str(log_path), "--level", "Warn"),
        ]

    def _environment(self, plan: MachinePlan) -> dict[str, str]:
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        return environment | {
            "LC_ALL": "C",
            "NOID_INSTANCE": plan.instance,
            "NOID_DATA_DIR": str(plan.data_dir),
            FINGERPRINT_VARIABLE: json.dumps(self._fingerprint),
        }


def _places(plan: MachinePlan) -> Places:
    return Places(directory=plan.directory, run_dir=plan.run_dir, disk=plan.volume.path)


def _not_started(plan: MachinePlan, error: NoidError, said: str) -> NoidError:
    """Return what to raise for *error*, which kept a machine from running. Firecracker has *said* something to it."""
    if isinstance(error, NoSpace) or free_bytes(plan.directory) < _FULL_BYTES:
        return NoSpace(
            f"VM {plan.instance} did not start: the disk of {plan.directory} is full. Free space there and "
            f"try again. ({error} Firecracker's log: {said})"
        )
    text = f"{busy_tap(plan.lease, str(error))}{error}"
    if isinstance(error, Refused):
        text = f"{text.removesuffix('.')}.{_NEXT_STEPS.get(error.call, '')}"
        if error.words in said and " / " not in said:  # one line, that repeats them
            return BackendError(f"VM {plan.instance} did not start: {text}")
    return BackendError(f"VM {plan.instance} did not start: {text} Firecracker's log: {said}")


def _taps(plan: MachinePlan) -> dict[str, str]:
    """Return the TAP devices of the plan's network cards by their names."""
    lease = plan.lease
    if lease is None or lease.kind == "none":
        return {}
    tap = tap_of(lease)
    if tap is None:
        raise Unsupported("firecracker", f"connect a VM by a {lease.kind!r} lease")
    return {CARD_NAME: tap}


def _clear(plan: MachinePlan) -> None:
    """Make the run directory what Firecracker expects: no sockets of a process before, and the disks by their names."""
    for name in (API_SOCKET, VSOCK_SOCKET, DISK_NAME, BASE_NAME):
        (plan.run_dir / name).unlink(missing_ok=True)
    (plan.run_dir / DISK_NAME).symlink_to(plan.volume.path)
    if plan.volume.base_path is not None:
        (plan.run_dir / BASE_NAME).symlink_to(plan.volume.base_path)


@contextlib.contextmanager
def _locked(disk: Path) -> Iterator[int]:
    """Yield a descriptor to inherit that locks *disk* for as long as anybody has it: Firecracker locks nothing."""
    fd = os.open(disk, os.O_RDWR | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BackendError(f"the disk {disk} is in use by another VM's process.") from error
        yield fd
    finally:
        os.close(fd)


async def _answering(process: VmmProcess, api: FirecrackerApi) -> None:
    """Return once Firecracker listens, which takes it some milliseconds and which nothing else tells.

    Raises:
        DependencyDown: it has ended before, or does not listen in time.
    """
    with trio.move_on_after(START_SECS):
        while not process.has_ended():
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                await api.connect()
                return
            await trio.sleep(_LISTEN_LOOK_SECS)
        await process.wait()
        raise DependencyDown(f"Firecracker ended before it listened to its API ({process.exit_text}).")
    raise DependencyDown(f"Firecracker did not listen to its API within {START_SECS:g} s; it may be stuck.")


async def _kill(process: VmmProcess) -> None:
    """Kill a process and wait for its end. Shielded and bounded."""
    process.send_kill()
    with trio.move_on_after(_CLEANUP_SECS, shield=True):
        await process.wait()


async def _end(process: VmmProcess, api: FirecrackerApi, lineage: Lineage) -> None:
    """Kill a process that nobody has yet, and let go of it. Shielded and bounded."""
    await _kill(process)
    lineage.close(is_over=True)
    with trio.move_on_after(_CLEANUP_SECS, shield=True):
        await api.aclose()
    process.close()
