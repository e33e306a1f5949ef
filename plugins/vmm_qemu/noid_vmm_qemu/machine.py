"""One running QEMU, as noid holds it: `noid.core.backends.Machine`."""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import secrets
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import trio

from noid.core.backends import Capture, MachineExit
from noid.core.model.vms import ProcessRef
from noid.errors import BackendError, Conflict, DependencyDown, Incompatible, NoidError, NoSpace
from noid.hostfs import os_errors
from noid.vmmhost import console_line
from noid.vmmhost.console_log import is_long, shorten
from noid.vmmhost.enclosure import Enclosure
from noid.vmmhost.process import VmmProcess
from noid_vmm_qemu.capture import STATE_NAME, reserve_memory, take
from noid_vmm_qemu.command_line import DISK_DEVICE, disk_node, file_node
from noid_vmm_qemu.qmp import Qmp, QmpError, QmpEvent

_STATE_ROOM_BYTES = 1 << 20
_PIVOT_SECS = 10.0
_CONSOLE_LOOK_SECS = 5.0
_FEED_SECS = 2.0
_REASONS = {
    "guest-shutdown": "shutdown",
    "guest-reset": "reset",
    "host-signal": "killed",
    "host-qmp-quit": "killed",
}

log = logging.getLogger(__name__)


class MachineEvents:
    """What a machine's events have told so far. It exists before the machine, because QEMU talks from the start."""

    def __init__(self, instance: str) -> None:
        self.paused = False
        self.resumed = False
        self.shutdown_reason: str | None = None
        self.migration: str | None = None
        self.starved = False  # paused by QEMU itself, because the host could not write its disk
        self.guest_left: Callable[[], None] = lambda: None  # called when the guest agent closes its end
        self._told = False
        self._instance = instance

    def adopt(self, *, paused: bool) -> None:
        """Begin with what a machine that is there already is."""
        self.paused = paused

    def note(self, event: QmpEvent) -> None:
        """Take notice of *event*."""
        if event.name == "STOP":
            self.paused = True
        elif event.name == "RESUME":
            self.paused, self.resumed, self.starved = False, True, False
        elif event.name == "SHUTDOWN":
            self.shutdown_reason = str(event.data.get("reason", "unknown"))
        elif event.name == "VSERPORT_CHANGE" and not event.data.get("open"):
            self.guest_left()
        elif event.name == "MIGRATION":
            self.migration = str(event.data.get("status"))
        elif event.name == "BLOCK_IO_ERROR" and event.data.get("action") == "stop":
            self.starved = True
            if not self._told:
                log.error(
                    "the disk of VM instance %s could not be written on the host (%s), so QEMU has paused the guest "
                    "before it loses data. Free space: then the guest goes on by itself.",
                    self._instance,
                    event.data.get("reason", "no reason given"),
                )
            self._told = True

    def fed(self) -> None:
        """Take notice that the machine has run for a while: the next time its disk is full is news again."""
        self._told = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """A layer QEMU has opened: its file, and the block node's name."""

    path: Path
    node: str


class QemuMachine:
    """See `noid.core.backends.Machine`. Made by `QemuBackend` only.

    *foreign* says what differs when the process was started by a noid with other settings or another QEMU: everything
    works but `capture`, because its checkpoint could be continued by nobody here.
    """

    def __init__(
        self,
        *,
        process: VmmProcess,
        enclosure: Enclosure,
        qmp: Qmp,
        events: MachineEvents,
        channel_path: str,
        memory: Path,
        mem_mib: int,
        console_input: Path,
        console_log: Path,
        foreign: str = "",
    ) -> None:
        self.ref: ProcessRef = process.ref
        self._process = process
        self._enclosure = enclosure
        self._qmp = qmp
        self._events = events
        self._channel_path = channel_path
        self._memory = memory
        self._mem_mib = mem_mib
        self._console_input = console_input
        self._console_log = console_log
        self._foreign = foreign
        self._top_node: str | None = None
        self._spare: _Layer | None = None
        self._reserve: mmap.mmap | None = None
        self._channel: trio.SocketStream | None = None
        events.guest_left = self._close_channel
        self._killed = False
        self._to_stay_paused = False

    async def prepare_pause(self, new_top: Path | None) -> None:
        """See `Machine.prepare_pause`. A layered disk's tables are synced here, which takes a disk's time."""
        if self._top_node is None:
            self._top_node = await self._disk_node()
        said = await self._qmp.execute("human-monitor-command", {"command-line": f"qemu-io {self._top_node} flush"})
        if said:
            log.info("flushing the disk of a VM before its pause: %s", said.strip())
        if self._reserve is None:
            self._reserve = await trio.to_thread.run_sync(reserve_memory)
        if self._spare is not None:  # of a pause that never came
            await self._qmp.execute("blockdev-del", {"node-name": self._spare.node})
            self._spare = None
        if new_top is not None:
            self._spare = await self._add_layer(new_top)

    async def pause(self) -> None:
        """See `Machine.pause`."""
        self._to_stay_paused = True
        await self._qmp.execute("stop")

    async def resume(self) -> None:
        """See `Machine.resume`."""
        self._to_stay_paused = False
        await self._qmp.execute("cont")

    async def _feed(self) -> None:
        """Let a guest go on that QEMU has paused for want of room on the host. Still none: it pauses again."""
        if not self._events.starved:
            self._events.fed()
            return
        await trio.sleep(_FEED_SECS)
        if not self._to_stay_paused:
            with contextlib.suppress(NoidError):  # it is about to end, which `wait` is waiting for
                await self._qmp.execute("cont")

    async def capture(self, into: Path) -> Capture:
        """See `Machine.capture`."""
        if self._foreign:
            raise Incompatible(
                f"this VM was started with {self._foreign}, so nothing on this host could continue its checkpoint. "
                "It goes on running; to make checkpoints again, restore or create it anew."
            )
        if not self._events.paused:
            raise BackendError("this VM is not paused, so its memory and devices cannot be captured as of one instant.")
        state = into / STATE_NAME
        if self._enclosure.is_room:
            # Into its own memory, where QEMU can write, and never into a file that others will continue from.
            with os_errors("saving the VM's devices"), self._enclosure.outgoing(self.ref.pid) as out:
                await self._save_devices(out.path)
                await trio.to_thread.run_sync(out.keep, state)
        else:
            await self._save_devices(state)
        with os_errors("reading the memory of a VM for its checkpoint"):
            reserve, self._reserve = self._reserve, None
            return await trio.to_thread.run_sync(take, self.ref.pid, self._memory, self._mem_mib, into, reserve)

    async def _save_devices(self, path: Path) -> None:
        try:
            await self._qmp.execute("xen-save-devices-state", {"filename": str(path), "live": False})
        except QmpError as error:
            if not self._enclosure.is_room:
                await trio.to_thread.run_sync(_check_room, path)
            raise BackendError(f"saving the VM's devices to {path} failed: {error.description}") from error

    async def pivot_disk(self, new_top: Path, format: str) -> None:
        """See `Machine.pivot_disk`. The file's own header must name its backing file already, relatively."""
        # Shielded, so that nobody has to find out after a cancellation where the guest's writes go.
        with trio.move_on_after(_PIVOT_SECS, shield=True):
            if self._top_node is None:
                self._top_node = await self._disk_node()
            layer, self._spare = self._spare, None
            if layer is None or layer.path != new_top:
                layer = await self._add_layer(new_top)
            try:
                await self._qmp.execute("blockdev-snapshot", {"node": self._top_node, "overlay": layer.node})
            except QmpError:
                await self._qmp.execute("blockdev-del", {"node-name": layer.node})
                raise
            self._top_node = layer.node
            return
        self._top_node = None  # whatever it is now, the next one asks
        raise DependencyDown(f"QEMU did not move the disk to {new_top} within {_PIVOT_SECS:.0f} s; it may be stuck.")

    async def disk_path(self) -> Path:
        """See `Machine.disk_path`."""
        node = await self._disk_node()
        # QEMU composes a json: text for the name of a disk that was pivoted; the file below it is just a file.
        for known in await self._qmp.execute("query-named-block-nodes", {"flat": True}):
            if known["node-name"] == file_node(node):
                return Path(known["file"])
        raise BackendError(f"QEMU does not say in which file the VM's disk {node} lies.")

    async def channel(self) -> trio.abc.Stream:
        """See `Machine.channel`. What is sent to a paused guest reaches it when it goes on, and not before.

        Raises:
            Conflict: there is a connection already; QEMU would let a second one wait without a word.
        """
        taken = self._channel is not None and self._channel.socket.fileno() >= 0
        if taken and not self._process.has_ended():
            raise Conflict("the guest channel of this VM is in use; close the other connection first.")
        self._channel = await connected(self._channel_path)
        return self._channel

    async def console(self) -> trio.abc.SendStream:
        """See `Machine.console`."""
        await trio.lowlevel.checkpoint()
        return console_line.connected(self._console_input)

    async def wait(self) -> MachineExit:
        """See `Machine.wait`.

        Raises:
            NotFound: `aclose` was called meanwhile.
        """
        over = False
        while not over:
            # Whoever waits for the end looks after console and disk meanwhile: there is always somebody who waits.
            with trio.move_on_after(_CONSOLE_LOOK_SECS) as scope:
                over = await self._qmp.drained(or_until=lambda: self._events.starved)
            if scope.cancelled_caught:
                await self._shorten_console()
            if not over:
                await self._feed()
        await self._process.wait()
        await self._enclosure.release()
        told = self._events.shutdown_reason
        if told is not None:
            return MachineExit(reason=_REASONS.get(told, "unknown"), detail=f"QEMU says {told}")
        how = self._process.exit_text or "how is not known, because an earlier agent started it"
        if why := self._enclosure.why_ended():
            return MachineExit(reason="killed", detail=why)
        killed = self._killed or self._process.exit_signal in (signal.SIGKILL, signal.SIGTERM)
        return MachineExit(reason="killed" if killed else "unknown", detail=f"the process ended without a word: {how}")

    async def press_power_button(self) -> None:
        """See `Machine.press_power_button`. ACPI's, which the guest's init or a daemon has to listen to."""
        await self._qmp.execute("system_powerdown")

    async def kill(self) -> None:
        """See `Machine.kill`. After `aclose` it does nothing: the process belongs to somebody else."""
        if self._process.is_let_go:
            return
        self._killed = True
        self._process.send_kill()
        await self._process.wait()
        await self._enclosure.release()

    async def aclose(self) -> None:
        """See `Machine.aclose`."""
        if self._channel is not None:
            await trio.aclose_forcefully(self._channel)
        if self._process.has_ended() and not self._process.is_let_go:  # ended by somebody who did not ask `kill`
            await self._enclosure.release()
        self._process.close()
        await self._qmp.aclose()

    async def _shorten_console(self) -> None:
        if not is_long(self._console_log):  # one stat: a thread for each machine every few seconds would be dearer
            return
        try:
            await trio.to_thread.run_sync(shorten, self._console_log)
        except NoidError as error:
            log.warning("%s It goes on growing.", error)

    async def _add_layer(self, path: Path) -> _Layer:
        """Open a layer's file without what it lies on."""
        # Any agent that held this machine may have added nodes; chance keeps their names apart.
        layer = _Layer(path=path, node=f"disk-{secrets.token_hex(8)}")
        with os_errors("giving a VM a new layer of its disk"):
            self._enclosure.give(path)
        await self._qmp.execute("blockdev-add", disk_node(layer.node, path, "qcow2", backing=False))
        return layer

    def _close_channel(self) -> None:
        """Let whoever talks to the guest agent know that it has gone: QEMU keeps the socket open all the same."""
        if self._channel is not None:
            self._channel.socket.close()

    async def _disk_node(self) -> str:
        for device in await self._qmp.execute("query-block"):
            if DISK_DEVICE in device.get("qdev", "").split("/") and "inserted" in device:
                return str(device["inserted"]["node-name"])
        raise BackendError("QEMU does not know the VM's disk any more.")


async def connected(path: str) -> trio.SocketStream:
    """Connect to the unix socket at *path*, where QEMU listens or, having inherited it, is about to.

    Raises:
        DependencyDown: nobody listens there: the process is gone.
    """
    socket = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    try:
        await socket.connect(path)
    except OSError as error:
        socket.close()
        raise DependencyDown(f"the VM does not answer on {path}: {error.strerror}. Its process has ended.") from error
    except BaseException:
        socket.close()
        raise
    return trio.SocketStream(socket)


def _check_room(state: Path) -> None:
    """Raise `NoSpace` if *state* could not grow: QEMU says of a full disk only that there was an I/O error."""
    try:
        fd = os.open(state, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, _STATE_ROOM_BYTES)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"saving the VM's devices failed: the disk of {state.parent} is full.") from error
        log.info("%s cannot be written: %s", state, error)
