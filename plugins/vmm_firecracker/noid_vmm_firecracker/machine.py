"""One running Firecracker, as noid holds it: `noid.core.backends.Machine`."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import trio

from noid.core.backends import Capture, MachineExit
from noid.core.model.vms import ProcessRef
from noid.errors import BackendError, Conflict, DependencyDown, Incompatible, NoidError, Unsupported
from noid.hostfs import os_errors, write_out
from noid.vmmhost import console_line
from noid.vmmhost.console_log import is_long, shorten
from noid.vmmhost.enclosure import Enclosure
from noid.vmmhost.process import VmmProcess
from noid.vmmhost.sockets import socket_itself
from noid_vmm_firecracker.api import Cut, FirecrackerApi, Snapshot
from noid_vmm_firecracker.endings import ending, says_halted, tail, vcpu_runtime_ns
from noid_vmm_firecracker.memory import Layer, Lineage, has_room

AGENT_PORT = 5005
API_SOCKET = "api.sock"
VSOCK_SOCKET = "v.sock"
LOG_NAME = "vmm.log"

_LOOK_SECS = 1.0
_KNOCK_SECS = (0.005, 0.01, 0.02, 0.05, 0.1)
_ANSWER_BYTES_MAX = 32

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where the files of one machine are: *directory* lasts, *run_dir* is where Firecracker works."""

    directory: Path
    run_dir: Path
    disk: Path

    @property
    def console_log(self) -> Path:
        """What the guest has printed."""
        return self.directory / console_line.CONSOLE_LOG

    @property
    def vmm_log(self) -> Path:
        """What Firecracker has to say."""
        return self.directory / LOG_NAME


class FirecrackerMachine:
    """See `noid.core.backends.Machine`. Made by `FirecrackerBackend` only.

    *foreign* says what differs when the process was started by a noid with other settings or another Firecracker:
    everything works but `capture`, because its checkpoint could be continued by nobody here.
    """

    def __init__(
        self,
        *,
        process: VmmProcess,
        enclosure: Enclosure,
        api: FirecrackerApi,
        places: Places,
        memory: Lineage,
        paused: bool = False,
        begin: Callable[[], Awaitable[None]] | None = None,
        foreign: str = "",
    ) -> None:
        self.ref: ProcessRef = process.ref
        self._process = process
        self._enclosure = enclosure
        self._api = api
        self._places = places
        self._memory = memory
        self._paused = paused
        self._begin = begin
        self._owes_resume = False
        self._foreign = foreign
        self._channel: trio.SocketStream | None = None
        self._knocking: trio.SocketStream | None = None
        self._is_connecting = False
        self._killed = False
        self._halted = False
        self._watcher: object | None = None

    async def prepare_pause(self, new_top: Path | None) -> None:
        """See `Machine.prepare_pause`. Writes out the disk, so that its freeze finds little to do, and makes room."""
        del new_top  # this VMM does not move disks
        snapshot = None
        if not self._enclosure.is_room:
            with os_errors("making room for the memory of a VM before its pause"):
                layer = await trio.to_thread.run_sync(self._memory.prepare, self._places.directory)
            snapshot = _snapshot(layer, layer.state_path, layer.path)
        self._api.rehearse_pause(snapshot)
        with os_errors("writing out the disk of a VM before its pause"):
            await trio.to_thread.run_sync(write_out, self._places.disk)

    async def pause(self) -> None:
        """See `Machine.pause`. Firecracker's disks are written by the thread that answers, so they are settled."""
        self._owes_resume = False
        await self._api.pause()
        self._paused = True

    async def resume(self) -> None:
        """See `Machine.resume`. After an error, whoever waits for the machine's end goes on trying: guests shall run.

        It may be that Firecracker is only slow: it answers nothing while it writes a snapshot that was given up. One
        that was restored paused is loaded now; if that fails, it is of no use any more.
        """
        if self._begin is not None:
            await self._begin()
            self._begin, self._paused = None, False
            return
        self._owes_resume = True
        try:
            await self._api.resume()
        except Cut:
            if self._process.has_ended():
                raise
            await self._api.resume()  # over a new connection; doing it twice is doing it once
        self._paused = self._owes_resume = False

    async def capture(self, into: Path) -> Capture:
        """See `Machine.capture`. A snapshot cuts the guest's connections, so the channel is closed with it."""
        if self._foreign:
            raise Incompatible(
                f"this VM was started with {self._foreign}, so nothing on this host could continue its checkpoint. "
                "It goes on running; to make checkpoints again, restore or create it anew."
            )
        if not self._paused:
            raise BackendError("this VM is not paused, so its memory and devices cannot be captured as of one instant.")
        if not self._enclosure.is_room:
            with os_errors("making room for the memory of a VM"):
                layer = self._memory.next_layer(self._places.directory)  # prepared, so it takes no thread
            await self._fill(layer, layer.state_path, layer.path)
            return self._memory.add(layer, into)
        # Into files of its own, where Firecracker can write: never into one that others will continue from.
        pid, in_memory = self.ref.pid, has_room(self._memory.size_bytes)
        with (
            os_errors("making room for a snapshot of a VM"),
            self._enclosure.outgoing(pid) as state,
            self._enclosure.outgoing(pid, in_memory=in_memory) as memory,
        ):
            layer = self._memory.next_layer(self._places.directory, (os.dup(memory.fd), os.dup(state.fd)))
            await self._fill(layer, state.path, memory.path)
        return self._memory.add(layer, into)

    async def _fill(self, layer: Layer, state: Path, memory: Path) -> None:
        try:
            await self._api.create_snapshot(_snapshot(layer, state, memory))
        except BaseException:
            self._lose(layer)
            raise
        finally:
            self._close_channel()

    def _lose(self, layer: Layer) -> None:
        """Firecracker may have forgotten what changed, so nothing but all of memory is sure to be right next time."""
        self._memory.lose(layer)
        self._memory.forget()

    async def pivot_disk(self, new_top: Path, format: str) -> None:
        """Firecracker cannot do it, and ``features`` says so.

        Raises:
            Unsupported: always.
        """
        del new_top, format
        await trio.lowlevel.checkpoint()
        raise Unsupported("firecracker", "move a disk while its VM runs")

    async def disk_path(self) -> Path:
        """See `Machine.disk_path`."""
        await trio.lowlevel.checkpoint()
        return self._places.disk

    async def channel(self) -> trio.abc.Stream:
        """See `Machine.channel`. Waits until the guest's agent listens, for as long as the machine lives.

        Raises:
            Conflict: there is a connection already; the guest would hang up on it for a second one.
        """
        taken = self._channel is not None and self._channel.socket.fileno() >= 0
        if (taken or self._is_connecting) and not self._process.has_ended():
            raise Conflict("the guest channel of this VM is in use; close the other connection first.")
        self._is_connecting = True
        try:
            knocks = 0
            while (stream := await self._knock()) is None:
                # Nothing tells when a guest begins to listen: until then Firecracker hangs up on whoever knocks.
                await trio.sleep(_KNOCK_SECS[min(knocks, len(_KNOCK_SECS) - 1)])
                knocks += 1
        finally:
            self._is_connecting = False
        self._channel = stream
        return stream

    async def _knock(self) -> trio.SocketStream | None:
        """Connect to the guest's agent, or return None because it does not listen yet."""
        path = self._places.run_dir / VSOCK_SOCKET
        socket = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        stream = self._knocking = trio.SocketStream(socket)
        answer = b""
        try:
            with socket_itself(path) as name:
                await socket.connect(name)
            await stream.send_all(f"CONNECT {AGENT_PORT}\n".encode())
            answer = await _line(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):  # closed by a capture, which cuts it off
            answer = b""
        except OSError as error:
            socket.close()
            text = f"the VM does not answer on {path}: {error.strerror}. Its process has ended."
            raise DependencyDown(text) from error
        except BaseException:
            socket.close()
            raise
        finally:
            self._knocking = None
        if answer.startswith(b"OK ") and answer.endswith(b"\n"):
            return stream
        socket.close()
        if self._process.has_ended():
            raise DependencyDown("the guest's agent cannot be reached: the VM's process has ended.")
        return None

    async def console(self) -> trio.abc.SendStream:
        """See `Machine.console`."""
        await trio.lowlevel.checkpoint()
        return console_line.connected(self._places.run_dir / console_line.CONSOLE_INPUT)

    async def press_power_button(self) -> None:
        """Firecracker has only Ctrl+Alt+Del, on which a Linux that does not listen restarts without writing its disk.

        Raises:
            Unsupported: always.
        """
        await trio.lowlevel.checkpoint()
        raise Unsupported("firecracker", "press a power button")

    async def wait(self) -> MachineExit:
        """See `Machine.wait`. Whoever waits for the end looks after the logs, and after guests that only halt."""
        me, looks = object(), _Looks(self._places.console_log, self.ref.pid)
        try:
            while True:
                with trio.move_on_after(_LOOK_SECS) as scope:
                    await self._process.wait()
                if not scope.cancelled_caught:
                    await self._enclosure.release()
                    return self._ending()
                if self._watcher is None:
                    self._watcher = me
                if self._watcher is me:
                    await self._look(looks)
        finally:
            if self._watcher is me:  # of several who wait, another one takes over
                self._watcher = None

    def _ending(self) -> MachineExit:
        if self._halted:
            return MachineExit(reason="shutdown", detail="the guest has switched itself off")
        if why := self._enclosure.why_ended():
            return MachineExit(reason="killed", detail=why)
        how = self._process.exit_text or "how is not known, because an earlier agent started it"
        killed = self._killed or self._process.exit_signal in (signal.SIGKILL, signal.SIGTERM)
        return ending(tail(self._places.console_log), killed=killed, how=how)

    async def _look(self, looks: _Looks) -> None:
        if self._owes_resume:
            await self._resume_at_last()
        if not self._paused and looks.has_halted():
            self._halted = True
            self._process.send_kill()
            return
        for path in (self._places.console_log, self._places.vmm_log):
            if is_long(path):  # one stat: a thread for each machine every second would be dearer
                try:
                    await trio.to_thread.run_sync(shorten, path)
                except NoidError as error:
                    log.warning("%s It goes on growing.", error)

    async def _resume_at_last(self) -> None:
        try:
            await self._api.resume()
        except NoidError as error:
            log.warning("VM process %d was paused for a checkpoint and does not go on yet: %s", self.ref.pid, error)
            return
        self._paused = self._owes_resume = False
        log.warning("VM process %d goes on; it was paused for longer than a checkpoint takes", self.ref.pid)

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
        self._close_channel()
        is_over = self._process.has_ended()
        self._memory.close(is_over=is_over)
        if is_over and not self._process.is_let_go:  # ended by somebody who did not ask `kill`
            await self._enclosure.release()
        self._process.close()
        await self._api.aclose()

    def _close_channel(self) -> None:
        """Let whoever talks to the agent know that it hears nothing more: Firecracker keeps the socket open."""
        for stream in (self._channel, self._knocking):
            if stream is not None:
                stream.socket.close()
        self._channel = None


def _snapshot(layer: Layer, state: Path, memory: Path) -> Snapshot:
    return Snapshot(state=state, memory=memory, diff=not layer.whole)


async def _line(stream: trio.SocketStream) -> bytes:
    """Return the first line that comes, and nothing behind it, which is the agent's. At the end, what there was."""
    line = b""
    while not line.endswith(b"\n") and len(line) < _ANSWER_BYTES_MAX:
        try:
            seen = await stream.socket.recv(_ANSWER_BYTES_MAX, trio.socket.MSG_PEEK)
        except OSError as error:
            raise trio.BrokenResourceError from error
        if not seen:
            break
        line += await stream.receive_some(seen.find(b"\n") + 1 or len(seen))
    return line


class _Looks:
    """Tells, looked at every now and then, whether a guest has halted: it said so, and no vCPU has run since."""

    def __init__(self, console_log: Path, pid: int) -> None:
        self._console_log = console_log
        self._pid = pid
        self._size = -1
        self._ran_ns: int | None = None

    def has_halted(self) -> bool:
        """Look once. Blocks for microseconds."""
        try:
            size = self._console_log.stat().st_size
        except OSError:
            return False
        if size != self._size:
            self._size = size
            self._ran_ns = vcpu_runtime_ns(self._pid) if says_halted(tail(self._console_log)) else None
            return False
        if self._ran_ns is None:
            return False
        before, self._ran_ns = self._ran_ns, vcpu_runtime_ns(self._pid)
        return self._ran_ns == before
