"""Drives a simulated guest: its time, its agent's channel, its serial console. What controls it is a subclass' affair.

Kernel arguments: ``simulated.mute`` makes a guest whose agent never answers, ``simulated.boot_secs=N`` one that takes
its time. A guest whose disk has a file ``/etc/stubborn`` acknowledges a shutdown and goes on. Standard library only.
"""

from __future__ import annotations

import base64
import json
import selectors
import socket
import time
from typing import Any

from noid.testing import simulated_ring as ring
from noid.testing.simulated_console import SimulatedConsole
from noid.testing.simulated_disk import SimulatedDisk
from noid.testing.simulated_guest import STDIN_BUFFER_BYTES, Refused, SimulatedGuest

_READ_BYTES = 65536


class Line:
    """A connection that speaks JSON lines, and whether more may be read from it."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket = connection
        self._received = bytearray()
        self.unsent = bytearray()

    def receive(self) -> list[dict[str, Any]] | None:
        """Return the complete requests, or None at the end."""
        try:
            data = self.socket.recv(_READ_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self._received += data
        *lines, rest = self._received.split(b"\n")
        self._received = bytearray(rest)
        return [json.loads(line) for line in lines]

    def send(self, message: dict[str, Any]) -> None:
        """Send as much as goes out; the rest waits."""
        self.unsent += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send what waits, as far as it goes out."""
        try:
            while self.unsent:
                del self.unsent[: self.socket.send(self.unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self.unsent.clear()  # the reader is gone; reading will notice


class _Stream:
    """A process as the attached host sees it: up to where its log was sent, and how much more of it may be."""

    def __init__(self, process_id: int, sent: int, credit: int) -> None:
        self.id = process_id
        self.sent = sent
        self.credit = credit
        self.end_was_sent = False


class SimulatedMachine:
    """A guest and what drives it: time, the agent's channel and the console. What controls it is a subclass' affair.

    Args:
        disk: The guest's disk.
        memory: The pages it continues from; without any it boots.
        cmdline: Its kernel arguments, see above.
        exec_listener: Where hosts connect to its agent.
        console: Its serial line, not started yet.
        selector: Watches all of them, and whatever else its maker has registered.
    """

    one_host = True
    """Whether the next host waits until the one before has gone."""

    def __init__(
        self,
        *,
        disk: SimulatedDisk,
        memory: dict[str, Any],
        cmdline: str,
        exec_listener: socket.socket,
        console: SimulatedConsole,
        selector: selectors.BaseSelector,
    ) -> None:
        self.disk = disk
        self.guest = SimulatedGuest(self.disk, dict(memory))
        boot_secs, self.mute = 0.0, False
        for argument in cmdline.split():
            self.mute = self.mute or argument == "simulated.mute"
            if argument.startswith("simulated.boot_secs="):
                boot_secs = float(argument.partition("=")[2])
        self.answers_at = 0.0 if memory else boot_secs
        self.selector = selector
        self.exec = exec_listener
        self.console = console
        self.console.start(self.guest)
        self.host: Line | None = None
        self.held: list[dict[str, Any]] = []
        self.streams: dict[int, _Stream] = {}  # by pid: those the host is attached to
        self.paused = False
        self.since = time.monotonic()
        self.uptime_then = float(self.guest.memory["uptime"])
        self._update_exec()

    def pause(self) -> None:
        """Stop the guest, its disk settled. Pausing a paused one does nothing."""
        if not self.paused:
            self.guest.run_until(self._uptime())
            self.uptime_then, self.paused = self._uptime(), True
            self.guest.memory["uptime"] = self.uptime_then
            self.disk.flush()
        self._update_exec()

    def resume(self) -> None:
        """Let the guest go on."""
        self.paused, self.since = False, time.monotonic() if self.paused else self.since
        self._update_exec()

    # --- time ------------------------------------------------------------------------------------------------------

    def _uptime(self) -> float:
        return self.uptime_then + (0.0 if self.paused else time.monotonic() - self.since)

    def serve(self) -> None:
        """Run until the guest or a signal ends it."""
        while True:
            self.turn()

    def turn(self) -> None:
        """Let the guest live up to now, then wait for what comes next, and see to it."""
        wait_secs: float | None = None
        if not self.paused:
            uptime = self._uptime()
            due = self.guest.run_until(uptime)
            if uptime < self.answers_at:
                due = min(due or self.answers_at, self.answers_at)
            wait_secs = None if due is None else max(0.0, due - uptime)
            self._deliver()
        for key, _ in self.selector.select(wait_secs):
            key.data(key.fileobj)

    # --- the guest agent's channel ---------------------------------------------------------------------------------

    def _update_exec(self) -> None:
        """Watch the exec listener or its one client. A paused guest reads nothing, and one client holds the place."""
        self.console.set_running(not self.paused)
        wanted: dict[Any, int] = {}
        if self.host is None or not self.one_host:
            wanted[self.exec] = selectors.EVENT_READ
        if self.host is None:
            pass
        elif self.paused:
            wanted[self.host.socket] = 0
        else:
            wanted[self.host.socket] = selectors.EVENT_READ | (selectors.EVENT_WRITE if self.host.unsent else 0)
        for target in (self.exec, self.host.socket if self.host else None):
            if target is None:
                continue
            registered = self.selector.get_map().get(target)
            events = wanted.get(target, 0)
            if registered is not None and registered.events != events:
                self.selector.unregister(target)
                registered = None
            if registered is None and events:
                self.selector.register(target, events, self._accept_exec if target is self.exec else self._on_host)

    def _accept_exec(self, listener: socket.socket) -> None:
        self.host = Line(listener.accept()[0])
        self._update_exec()

    def _detach(self) -> None:
        """The host went away: its processes go on, what they write is kept as far as their logs reach."""
        if self.host is not None:
            if self.host.socket in self.selector.get_map():
                self.selector.unregister(self.host.socket)
            self.host.socket.close()
        self.host = None
        self.streams.clear()
        self.guest.unsent.clear()
        self.held.clear()
        self._update_exec()

    def _on_host(self, _: socket.socket) -> None:
        if self.host is None:
            return
        self.host.flush()
        requests = self.host.receive()
        if requests is None:
            self._detach()
            return
        self.held += requests
        self._deliver()

    def _deliver(self) -> None:
        """Let the agent answer what was asked, and send what processes wrote as far as the host gave credit."""
        if self.paused:
            return
        if not self.mute and self._uptime() >= self.answers_at:
            while self.held and self.host is not None:
                self._answer(self.held.pop(0))
        for pid, stream in list(self.streams.items()):
            self._send_output(pid, stream)
        events, self.guest.events = self.guest.events, []
        for pid, kind, *facts in events:
            if kind == "end":
                self._end(facts[0])
            elif kind == "released":
                self._detach_process(pid)
            elif pid in self.streams and self.host is not None:
                self.host.send({"event": "consumed", "id": self.streams[pid].id, "bytes": facts[0]})
        self.console.update()
        self._update_exec()

    def _send_output(self, pid: int, stream: _Stream) -> None:
        if self.host is None or f"log:{pid}" not in self.guest.memory:
            return
        log = self.guest.log(pid)
        for number, offset, data in ring.pieces(log, stream.sent, stream.credit):
            stream.credit -= len(data)
            stream.sent = offset + len(data)
            encoded = base64.b64encode(data).decode()
            said = {"event": "output", "id": stream.id, "stream": number, "offset": offset, "data": encoded}
            self.host.send(said)
        if self.guest.unsent.get(pid) != stream.sent:
            self.guest.unsent[pid] = stream.sent
            self.guest.forget_sent(pid)
        end = self.guest.exit(pid)
        if end is not None and not stream.end_was_sent and stream.sent == log["end"]:
            self.host.send({"event": "exit", "id": stream.id, "code": end[0], "signal": end[1]})
            stream.end_was_sent = True

    def _detach_process(self, pid: int) -> None:
        stream = self.streams.pop(pid, None)
        self.guest.unsent.pop(pid, None)
        if stream is not None and self.host is not None:
            self.host.send({"event": "released", "id": stream.id})

    def _answer(self, request: dict[str, Any]) -> None:
        host, guest = self.host, self.guest
        if host is None:
            return
        pid = guest.pid_of(request["id"]) if "id" in request else None
        match request["op"]:
            case "hello" | "ping":
                host.send({"event": request["op"], "number": request["number"]})
            case "start":
                self._start(host, request)
            case "resize_console":
                guest.memory["console_size"] = [request["columns"], request["rows"]]
                host.send({"event": "resized", "number": request["number"]})
            case "list":
                host.send({"event": "listed", "number": request["number"], "processes": guest.listing()})
            case "attach":
                self._attach(host, pid, request)
            case "wake":
                entropy = base64.b64decode(request["entropy"])
                names = (request["hostname"], request["machine_id"], request["unix_ns"])
                items = guest.wake(*names, entropy, request["generation"])
                host.send({"event": "woken", "number": request["number"], "items": items})
            case "power_off" | "reboot":
                self.disk.flush()
                host.send({"event": "powering_off", "number": request["number"]})
                if not self.is_stubborn():
                    guest.events.append((0, "end", "shutdown" if request["op"] == "power_off" else "reset"))
            case "release" if pid is None:
                host.send({"event": "released", "id": request["id"]})
            case _ if pid is None:
                pass  # about a process that is gone
            case "stdin":
                guest.feed(pid, None if request["data"] is None else base64.b64decode(request["data"]))
            case "credit" if pid in self.streams:
                self.streams[pid].credit += request["bytes"]
            case "signal":
                guest.signal(pid, request["signo"])
            case "resize":
                guest.resize(pid, request["columns"], request["rows"])
            case "end":
                guest.end(pid, request["grace_secs"])
            case "release":
                guest.unsent.pop(pid, None)  # what it still writes nobody wants
                guest.release(pid, request["grace_secs"])

    def _start(self, host: Line, request: dict[str, Any]) -> None:
        guest, process = self.guest, request["process"]
        try:
            pid = guest.start(
                request["id"], process["argv"], process["env"], process["cwd"], process["user"], process["stdin"],
                tty=process["tty"], log_bytes=process["log_bytes"], label=process["label"],
            )  # fmt: skip
        except Refused as error:
            host.send({"event": "refused", "number": request["number"], "text": str(error)})
            return
        self.streams[pid] = _Stream(request["id"], 0, request["credit"])
        guest.unsent[pid] = 0
        guest.begin(pid)
        answer = {"event": "started", "number": request["number"], "pid": pid, "stdin_window": STDIN_BUFFER_BYTES}
        host.send(answer)

    def _attach(self, host: Line, pid: int | None, request: dict[str, Any]) -> None:
        if pid is None:
            host.send({"event": "missing", "number": request["number"]})
            return
        log = self.guest.log(pid)
        start = min(max(request["offset"], log["start"]), log["end"])
        self.streams[pid] = _Stream(request["id"], start, request["credit"])
        self.guest.unsent[pid] = start
        window = self.guest.stdin_window(pid)
        answer = {"event": "attached", "number": request["number"], "pid": pid, "start": start}
        host.send(answer | {"stdin_window": window, "stdin_taken": self.guest.stdin_taken(pid)})

    def is_stubborn(self) -> bool:
        """Whether the guest ignores that it is to end."""
        return self.disk.read("/etc/stubborn") is not None

    def _end(self, reason: str) -> None:
        """The guest has ended: *reason* is ``shutdown`` or ``reset``."""
        raise NotImplementedError
