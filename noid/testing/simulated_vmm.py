"""A VMM without a VM: `VmmBackend` on simulated machines, one real process each, with faults on demand.

It passes the conformance suite the real ones pass (`noid.testing.vmm_conformance`), boots in 50 ms and needs nothing
but Python, so that the core can be failed, cancelled and killed at every step, often.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

import noid
from noid.core.backends import (
    AgentContext,
    BackendSpec,
    Capture,
    ExecBackend,
    LaunchPlan,
    Machine,
    MachineExit,
    MachinePlan,
    RestorePlan,
    VmmBackend,
    VmmFeatures,
)
from noid.core.model.vms import ProcessRef
from noid.errors import BackendError, DependencyDown, NoidError, NoSpace, NotFound, Unsupported
from noid.hookspecs import hookimpl
from noid.hostfs import os_errors
from noid.testing.faults import Faults
from noid.testing.processes import process_ref, reap
from noid.testing.simulated_exec import SimulatedExec
from noid.testing.simulated_guest import merged

_BOOTSTRAP = "import sys; sys.path.append(sys.argv.pop(1)); from noid.testing.simulated_machine import main; main()"
_REPORT_FD = 3
_ADOPT_SECS = 3.0
_KILL_SECS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedConfig:
    """``[plugins.vmm_simulated]`` and ``[plugins.exec_simulated]``: nothing to configure."""


class SimulatedVmm:
    """Runs simulated machines.

    Args:
        faults: What goes wrong, and when.
        qcow2: Pretend to be a VMM that opens layered disks and moves a live one onto a new layer. The layers are real
            qcow2 files; what the guest writes lies behind what qcow2 uses of them.
        version: Part of the fingerprint, to make checkpoints another VMM took.
    """

    name = "simulated"

    def __init__(self, faults: Faults | None = None, *, qcow2: bool = False, version: str = "1") -> None:
        self.features = VmmFeatures(
            accelerator="none",
            disk_formats=frozenset({"raw", "qcow2"} if qcow2 else {"raw"}),
            disk_pivot=qcow2,
            network_kinds=frozenset({"none", "user"}),
        )
        self._faults = faults or Faults()
        self._version = version

    def fingerprint(self) -> Mapping[str, str]:
        """Return what a checkpoint depends on."""
        return {"vmm": self.name, "version": self._version, "accelerator": "none", "machine": "simulated"}

    async def launch(self, plan: LaunchPlan) -> Machine:
        """Boot."""
        await self._faults.before("launch")
        memory = plan.directory / "memory"
        boot = {"kernel": str(plan.kernel), "initrd": str(plan.initrd), "cmdline": plan.cmdline}
        machine = await self._spawn(plan, {**boot, "memory": str(memory)}, memory, "launch")
        return await self._handed_over(machine, "launch")

    async def restore(self, plan: RestorePlan) -> Machine:
        """Continue from a capture."""
        await self._faults.before("restore")
        config = {"memory": str(plan.memory), "state": str(plan.state)}
        machine = await self._spawn(plan, config, plan.memory, "restore")
        if plan.paused:
            await machine.pause()
        return await self._handed_over(machine, "restore")

    async def adopt(self, ref: ProcessRef, plan: MachinePlan, memory: Path) -> Machine:
        """Take hold of a machine an earlier agent started."""
        await self._faults.before("adopt", ref.pid)
        gone = NotFound(f"the VMM process {ref.pid} of {plan.instance} is gone. Its VM has to be started anew.")
        try:
            pidfd = os.pidfd_open(ref.pid)
        except ProcessLookupError:
            raise gone from None
        machine = SimulatedMachine(ref, pidfd, plan.run_dir, memory, self._faults)
        try:
            if process_ref(ref.pid) != ref:
                raise gone
            try:
                with trio.fail_after(_ADOPT_SECS):
                    status = await machine.ask("status")
            except trio.TooSlowError as error:
                text = f"the VMM process {ref.pid} of {plan.instance} does not answer within {_ADOPT_SECS} s. Kill it."
                raise DependencyDown(text) from error
            if status["instance"] != plan.instance:
                raise NotFound(f"process {ref.pid} runs {status['instance']}, not {plan.instance}.")
        except BaseException:
            await machine.aclose()
            raise
        await self._faults.after("adopt", ref.pid)
        return machine

    async def _handed_over(self, machine: SimulatedMachine, call: str) -> Machine:
        """Return *machine*, unless a fault strikes before its caller has it."""
        try:
            await self._faults.after(call, machine.ref.pid)
        except (Exception, trio.Cancelled):
            await machine.end_now()  # noqa: ASYNC102  # shields itself
            raise
        return machine

    async def _spawn(self, plan: MachinePlan, fields: Mapping[str, str], memory: Path, step: str) -> SimulatedMachine:
        if plan.volume.format not in self.features.disk_formats:
            raise Unsupported(self.name, f"open {plan.volume.format} disks")
        if plan.lease is not None and plan.lease.kind not in self.features.network_kinds:
            raise Unsupported(self.name, f"connect a network card to {plan.lease.kind}")
        shape = {"cpus": plan.cpus, "mem_mib": plan.mem_mib, "instance": plan.instance}
        places = {"run_dir": str(plan.run_dir), "disk": str(plan.volume.path)}
        config = {**shape, **places, "console": str(plan.directory / "serial.log"), **fields}
        with os_errors(f"preparing the {step} of {plan.instance}"):
            (plan.run_dir / "end.json").unlink(missing_ok=True)
            reader, writer = os.pipe2(os.O_CLOEXEC)
        report = trio.lowlevel.FdStream(reader)
        try:
            try:
                with os_errors(f"starting the simulated VMM of {plan.instance}"):
                    pid = await trio.to_thread.run_sync(_start_process, plan, config, writer)
            finally:
                os.close(writer)
            # No await between the process and its owner: whatever strikes from here on, the process is ended.
            machine = SimulatedMachine(_living(pid), os.pidfd_open(pid), plan.run_dir, memory, self._faults)
            try:
                answer = b""
                while data := await report.receive_some():
                    answer += data
                if not answer:
                    raise BackendError(f"the simulated VMM died during {step}. See {plan.directory / 'vmm.log'}.")
                _checked(json.loads(answer), step)
            except BaseException:
                await machine.end_now()  # noqa: ASYNC102  # shields itself
                raise
        finally:
            report.close()  # aclose() would be one more place for a cancellation, with nobody left to end the process
        return machine


class SimulatedMachine:
    """One simulated VMM process."""

    def __init__(self, ref: ProcessRef, pidfd: int, run_dir: Path, memory: Path, faults: Faults) -> None:
        self.ref = ref
        self._pidfd = pidfd
        self._run_dir = run_dir
        self._memory = memory
        self._faults = faults
        self._end: MachineExit | None = None
        self._killed = False

    async def ask(self, op: str, **fields: str) -> Any:
        """Make a request on the control socket and return the answer."""
        try:
            async with await trio.open_unix_socket(str(self._run_dir / "control.sock")) as stream:
                await stream.send_all(json.dumps({"op": op, **fields}).encode() + b"\n")
                answer = b""
                while not answer.endswith(b"\n") and (data := await stream.receive_some(65536)):
                    answer += data
        except (OSError, trio.BrokenResourceError) as error:
            raise self._gone(op) from error
        if not answer:
            raise self._gone(op)
        return _checked(json.loads(answer), op)

    @contextlib.asynccontextmanager
    async def _faulty(self, call: str) -> AsyncIterator[None]:
        await self._faults.before(call, self.ref.pid)
        yield
        await self._faults.after(call, self.ref.pid)

    async def prepare_pause(self, new_top: Path | None) -> None:
        """Write out what is held back of the disk."""
        async with self._faulty("prepare_pause"):
            await self.ask("flush")

    async def pause(self) -> None:
        """Stop the vCPUs and settle the disk."""
        async with self._faulty("pause"):
            await self.ask("pause")

    async def resume(self) -> None:
        """Let the vCPUs run."""
        async with self._faulty("resume"):
            await self.ask("resume")

    async def capture(self, into: Path) -> Capture:
        """Write the device state to ``into/state`` and take hold of changed memory."""
        async with self._faulty("capture"):
            changed = await self.ask("capture", into=str(into))
        return SimulatedCapture(self._memory, into, changed, self._faults, self.ref.pid)

    async def pivot_disk(self, new_top: Path, format: str) -> None:
        """Move the live disk onto *new_top*."""
        async with self._faulty("pivot_disk"):
            await self.ask("pivot", path=str(new_top), format=format)

    async def disk_path(self) -> Path:
        """Return the file the machine writes its disk to now."""
        async with self._faulty("disk_path"):
            return Path((await self.ask("status"))["disk"])

    async def channel(self) -> trio.abc.Stream:
        """Connect to the guest agent's byte stream."""
        async with self._faulty("channel"):
            try:
                return await trio.open_unix_socket(str(self._run_dir / "exec.sock"))
            except OSError as error:
                raise self._gone("the guest agent's channel") from error

    async def console(self) -> trio.abc.SendStream:
        """Return a way to type on the guest's serial line."""
        async with self._faulty("console"):
            try:
                fd = os.open(self._run_dir / "console.in", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError as error:
                raise self._gone("the serial console") from error
            return trio.lowlevel.FdStream(fd)

    async def press_power_button(self) -> None:
        """Let the guest shut down as if somebody had pressed its power button."""
        async with self._faulty("press_power_button"):
            await self.ask("power_button")

    async def wait(self) -> MachineExit:
        """Return when the process has ended and its end is known."""
        await self._ended()
        return self._why()

    async def kill(self) -> None:
        """End the process now and wait until it is gone."""
        async with self._faulty("kill"):
            await self._kill()

    async def aclose(self) -> None:
        """Let go of the process without ending it."""
        await trio.lowlevel.checkpoint()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    async def end_now(self) -> None:
        """Kill and let go, for whoever cannot hand the machine to a caller any more. Shielded and bounded."""
        with trio.move_on_after(_KILL_SECS, shield=True):
            await self._kill()
            await self.aclose()

    async def _kill(self) -> None:
        if self._end is None and self._pidfd >= 0:
            self._killed = True
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            await self._ended()
            self._why()

    async def _ended(self) -> None:
        """Wait for the end of the process, on a descriptor of one's own: trio allows one waiter for each.

        It is looked at again after each wake-up: a cancelled wait on a duplicate leaves epoll watching the old number
        for a hang-up, and whoever gets that number next is woken in its stead.
        """
        if self._end is not None:
            return
        if self._pidfd < 0:
            raise BackendError("this machine was let go of; adopt it to wait for it.")
        mine = os.dup(self._pidfd)
        try:
            while not select.select([mine], [], [], 0)[0]:
                await trio.lowlevel.wait_readable(mine)
        finally:
            os.close(mine)

    def _why(self) -> MachineExit:
        if self._end is None:
            status = reap(self._pidfd) if self._pidfd >= 0 else None
            try:
                self._end = MachineExit(reason=json.loads((self._run_dir / "end.json").read_bytes())["reason"])
            except FileNotFoundError:
                killed = self._killed or (status is not None and status.si_code == os.CLD_KILLED)
                detail = "" if status is None else f"status {status.si_status}"
                self._end = MachineExit(reason="killed" if killed else "unknown", detail=detail)
        return self._end

    def _gone(self, what: str) -> NoidError:
        return DependencyDown(f"the simulated VMM process {self.ref.pid} does not answer ({what}): it has ended.")


class SimulatedCapture:
    """What a paused simulated machine left behind: the pages it changed since the image it maps."""

    def __init__(self, parent: Path, into: Path, changed: dict[str, Any], faults: Faults, pid: int) -> None:
        self.changed_bytes = len(json.dumps(changed))
        self._parent = parent
        self._into = into
        self._changed: dict[str, Any] | None = changed
        self._faults = faults
        self._pid = pid

    async def finish(self) -> None:
        """Build the memory image from the parent image and what changed."""
        await self._faults.before("capture.finish", self._pid)
        if self._changed is None:
            raise BackendError("this capture was finished or discarded before. Pause the machine and capture again.")
        changed, self._changed = self._changed, None
        await trio.to_thread.run_sync(self._build, changed)
        await self._faults.after("capture.finish", self._pid)

    def discard(self) -> None:
        """Free what is held."""
        self._changed = None

    def _build(self, changed: dict[str, Any]) -> None:
        with os_errors("building the memory image"):
            memory = merged(json.loads(self._parent.read_bytes()), changed)
            (self._into / "memory").write_text(json.dumps(memory))


class SimulatedPlugin:
    """The plugin to hand to ``Plugins(...)``: a VMM and an exec backend named ``simulated``."""

    name = "simulated"

    def __init__(self, faults: Faults | None = None, *, qcow2: bool = False, version: str = "1") -> None:
        self.faults = faults or Faults()
        self.vmm = SimulatedVmm(self.faults, qcow2=qcow2, version=version)
        self.exec = SimulatedExec(self.faults)

    @hookimpl
    def vmm_backend(self) -> BackendSpec[VmmBackend]:
        """Offer the simulated VMM."""
        return BackendSpec("simulated", SimulatedConfig, self._open_vmm)

    @hookimpl
    def exec_backend(self) -> BackendSpec[ExecBackend]:
        """Offer its exec backend."""
        return BackendSpec("simulated", SimulatedConfig, self._open_exec)

    @hookimpl
    def initrd_files(self, architecture: str) -> dict[str, bytes]:
        """Add nothing to any initrd."""
        return {}

    @contextlib.asynccontextmanager
    async def _open_vmm(self, _config: SimulatedConfig, _context: AgentContext) -> AsyncIterator[VmmBackend]:
        yield self.vmm

    @contextlib.asynccontextmanager
    async def _open_exec(self, _config: SimulatedConfig, _context: AgentContext) -> AsyncIterator[ExecBackend]:
        yield self.exec


def _start_process(plan: MachinePlan, config: Mapping[str, Any], writer: int) -> int:
    """Start the VMM process in a session of its own and return its pid."""
    root = str(Path(noid.__file__).parents[1])
    argv = [sys.executable, "-I", "-S", "-c", _BOOTSTRAP, root, json.dumps(config)]
    marks = {"NOID_INSTANCE": plan.instance, "NOID_DATA_DIR": str(plan.data_dir)}
    log = str(plan.directory / "vmm.log")
    return os.posix_spawn(
        sys.executable,
        argv,
        {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", **marks},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
            (os.POSIX_SPAWN_DUP2, writer, _REPORT_FD),
        ],
        setsid=True,
    )


def _living(pid: int) -> ProcessRef:
    """Return the reference of our child *pid*, which has not been reaped and therefore exists, perhaps as a zombie."""
    ref = process_ref(pid)
    if ref is None:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
        raise BackendError("the simulated VMM died as it was started.")
    return ref


def _checked(answer: Mapping[str, Any], step: str) -> Any:
    """Return what the VMM answered.

    Raises:
        NoSpace: it hit a full disk.
        BackendError: it refused.
    """
    if "ok" in answer:
        return answer["ok"]
    kind = NoSpace if answer["errno"] in (errno.ENOSPC, errno.EDQUOT) else BackendError
    raise kind(f"the simulated VMM failed to {step}: {answer['error']}.")
