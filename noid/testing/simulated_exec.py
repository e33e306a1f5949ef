"""The exec backend of simulated VMs: the host's end of the simulated guest agent's JSON lines."""

from __future__ import annotations

import base64
import itertools
import json
import secrets
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from noid.core.backends import ConsolePort, Guest, GuestConnection, Machine, Process
from noid.core.model.connections import ConnectRequest
from noid.core.model.files import FileTransfer
from noid.core.model.guest_processes import GuestProcessInfo, OutputChunk, ProcessExit, Usage
from noid.core.model.processes import ExecRequest, Gap, TerminalSize
from noid.core.model.vms import Identity, Receipt, ReceiptItem
from noid.errors import BackendError, DependencyDown, InvalidRequest, NotFound, Unreachable, Unsupported
from noid.testing.faults import Faults

RELEASE_GRACE_SECS = 0.5
RELEASE_BOUND_SECS = 5.0
OUTPUT_WINDOW_BYTES = 262144
_STDIN_PIECE_BYTES = 16384
SERVICES = {7: ("cat",), 13: ("echo", "the time is now"), 19: ("yes",), 104: ("sh", "-c", "echo half; exit 1")}
"""What a simulated guest has at its ports: echo, daytime, chargen, and one that breaks off in its middle."""


class SimulatedExec:
    """Reaches into simulated guests."""

    name = "simulated"
    needs_agent = True

    def __init__(self, faults: Faults | None = None) -> None:
        self._faults = faults or Faults()

    @asynccontextmanager
    async def connect(self, machine: Machine, console: ConsolePort) -> AsyncIterator[Guest]:
        """Attach to the machine's guest agent; entering waits until it answers."""
        await self._faults.before("connect", machine.ref.pid)
        stream = await machine.channel()
        failure: BaseException | None = None
        async with stream, trio.open_nursery() as nursery:
            guest = SimulatedGuestLink(stream, machine.ref.pid, self._faults)
            nursery.start_soon(guest.read)
            nursery.start_soon(guest.write)
            try:
                await guest.call("hello")
                await self._faults.after("connect", machine.ref.pid)
                yield guest
            except trio.Cancelled:
                raise
            except BaseException as error:  # noqa: BLE001, RUF100  # re-raised below: errors must not cross the nursery
                failure = error
            finally:
                nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure


class SimulatedGuestLink:
    """One conversation with a guest agent: the `Guest` protocol."""

    features = frozenset({"sessions", "tty", "signals", "stdin", "stderr", "ports", "identity", "power"})

    def __init__(self, stream: trio.abc.Stream, pid: int, faults: Faults) -> None:
        self._stream = stream
        self._pid = pid
        self._faults = faults
        self._numbers = itertools.count(1)
        self._unsent: deque[bytes] = deque()
        self._to_send = trio.lowlevel.ParkingLot()
        self._answers: dict[int, dict[str, Any] | None] = {}
        self._answered = trio.lowlevel.ParkingLot()
        self._processes: dict[int, SimulatedProcess] = {}
        self.gone = False
        self.heard_at = trio.current_time()

    # --- the wire --------------------------------------------------------------------------------------------------

    def post(self, message: dict[str, Any]) -> None:
        """Send in order, without waiting, so that no cancellation can tear a line. Credit bounds what may grow."""
        self._unsent.append(json.dumps(message).encode() + b"\n")
        self._to_send.unpark_all()

    async def write(self) -> None:
        """Send what was posted."""
        try:
            while True:
                while self._unsent:
                    await self._stream.send_all(self._unsent.popleft())
                await self._to_send.park()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._lose()

    async def read(self) -> None:
        """Hand out what the guest says, until it says no more."""
        received = bytearray()
        try:
            while data := await self._stream.receive_some(65536):
                received += data
                self.heard_at = trio.current_time()
                *lines, rest = received.split(b"\n")
                received = bytearray(rest)
                for line in lines:
                    self._take(json.loads(line))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self._lose()

    def _take(self, event: dict[str, Any]) -> None:
        if "number" in event:
            if event["number"] in self._answers:
                self._answers[event["number"]] = event
                self._answered.unpark_all()
        elif process := self._processes.get(event["id"]):
            process.take(event)

    def _lose(self) -> None:
        self.gone = True
        self._answered.unpark_all()
        for process in self._processes.values():
            process.changed.unpark_all()

    def lost(self) -> DependencyDown:
        """The error for whoever waits for a guest that is no more."""
        return DependencyDown("the simulated guest went away. Look whether its VM still runs.")

    async def call(self, op: str, **fields: Any) -> dict[str, Any]:
        """Ask and return the answer."""
        if self.gone:
            raise self.lost()
        number = next(self._numbers)
        self._answers[number] = None
        try:
            self.post({"op": op, "number": number, **fields})
            while (answer := self._answers[number]) is None:
                if self.gone:
                    raise self.lost()
                await self._answered.park()
            return answer
        finally:
            del self._answers[number]

    # --- Guest -----------------------------------------------------------------------------------------------------

    async def start(self, request: ExecRequest) -> Process:
        """Start a process and attach to it."""
        await self._faults.before("start", self._pid)
        process_id = 0x80000000 | secrets.randbits(31)
        process = self._processes[process_id] = SimulatedProcess(process_id, self, 0)
        tty = request.tty and [request.tty.columns, request.tty.rows]
        fields = {"argv": list(request.argv), "env": dict(request.env), "stdin": request.stdin, "tty": tty}
        fields |= {"cwd": request.cwd, "user": request.user, "log_bytes": request.log_bytes, "label": request.label}
        try:
            answer = await self.call("start", id=process_id, credit=OUTPUT_WINDOW_BYTES, process=fields)
        except BaseException:
            del self._processes[process_id]
            if not self.gone:  # it may have started: then it goes with its caller
                self.post({"op": "release", "id": process_id, "grace_secs": 0.0})
            raise
        if answer["event"] == "refused":
            del self._processes[process_id]
            raise InvalidRequest(f"{answer['text']}.")
        process.pid, process.stdin_window = answer["pid"], answer["stdin_window"]
        await self._faults.after("start", self._pid)
        return process

    async def attach(self, process_id: int, offset: int) -> Process:
        """Attach to a process whose output is then received from *offset*."""
        await self._faults.before("attach", self._pid)
        before = self._processes.get(process_id)
        if before is not None:
            before.drop()
        process = self._processes[process_id] = SimulatedProcess(process_id, self, offset)
        answer = await self.call("attach", id=process_id, offset=offset, credit=OUTPUT_WINDOW_BYTES)
        if answer["event"] == "missing":
            del self._processes[process_id]
            raise NotFound(f"the guest has no process {process_id:08x}.")
        process.pid, process.stdin_window = answer["pid"], process.stdin_window + answer["stdin_window"]
        process.stdin_taken = answer["stdin_taken"]
        await self._faults.after("attach", self._pid)
        return process

    async def processes(self) -> list[GuestProcessInfo]:
        """Return the processes there are."""
        await self._faults.before("processes", self._pid)
        answer = await self.call("list")
        return [
            GuestProcessInfo(
                id=page["id"],
                pid=page["pid"],
                running=page["running"],
                tty=page["tty"],
                stdin=page["stdin"],
                log_start=page["start"],
                log_end=page["end"],
                exit=None if page["exit"] is None else ProcessExit(code=page["exit"][0], signal=page["exit"][1]),
                started_at_unix_ns=page["started"],
                label=page["label"],
            )
            for page in answer["processes"]
        ]

    async def release(self, process: Process | int) -> None:
        """Forget *process*: TERM, and KILL after a grace."""
        await self._faults.before("release", self._pid)
        process_id = process if isinstance(process, int) else process.id
        mine = self._processes.setdefault(process_id, SimulatedProcess(process_id, self, 0))
        mine.drop()
        if self.gone:
            return
        self.post({"op": "release", "id": process_id, "grace_secs": RELEASE_GRACE_SECS})
        with trio.move_on_after(RELEASE_BOUND_SECS):
            while not mine.released and not self.gone:
                await mine.changed.park()
        if self._processes.get(process_id) is mine:
            del self._processes[process_id]

    async def transfer(self, request: FileTransfer) -> Process:
        """Refuse: `features` says that the simulated guest has no files to speak of.

        Raises:
            Unsupported: always.
        """
        raise Unsupported("simulated", f"copy {request.path!r}")

    async def connect(self, request: ConnectRequest) -> GuestConnection:
        """Connect to what the simulated guest has instead of servers: see `SERVICES`."""
        await self._faults.before("connect_port", self._pid)
        argv = SERVICES.get(request.port)
        if argv is None:
            raise Unreachable(f"nothing listens at {request.target} in the simulated guest (connection refused).")
        process = await self.start(ExecRequest(argv=argv, user=request.user, stdin=True))
        return SimulatedConnection(self, process)

    async def wake(self, identity: Identity) -> Receipt:
        """Make the guest its own."""
        await self._faults.before("wake", self._pid)
        answer = await self.call(
            "wake",
            hostname=identity.hostname,
            machine_id=identity.machine_id,
            unix_ns=identity.unix_ns,
            entropy=base64.b64encode(identity.entropy).decode(),
            generation=identity.generation,
        )
        await self._faults.after("wake", self._pid)
        return Receipt(items=tuple(ReceiptItem(**item) for item in answer["items"]))

    async def resize_console(self, size: TerminalSize) -> None:
        """Tell the guest how large its console's terminal is."""
        await self.call("resize_console", columns=size.columns, rows=size.rows)

    async def ping(self) -> float:
        """Return the round trip in seconds."""
        await self._faults.before("ping", self._pid)
        asked = trio.current_time()
        await self.call("ping")
        return trio.current_time() - asked

    async def power_off(self) -> None:
        """Ask the guest to power off."""
        await self._faults.before("power_off", self._pid)
        await self.call("power_off")

    async def reboot(self) -> None:
        """Ask the guest to reboot."""
        await self._faults.before("reboot", self._pid)
        await self.call("reboot")


class SimulatedConnection:
    """A connection to a service of a simulated guest: the `GuestConnection` protocol."""

    def __init__(self, link: SimulatedGuestLink, process: Process) -> None:
        self._link = link
        self._process = process
        self._exit: ProcessExit | None = None
        self._sent_all = trio.Event()

    async def send_all(self, data: bytes) -> None:
        """Send *data*."""
        await self._process.send_stdin(data)

    async def send_eof(self) -> None:
        """Tell the service that no more comes."""
        self._sent_all.set()
        await self._process.close_stdin()

    async def receive_some(self) -> bytes:
        """Return what comes next, or nothing at the end."""
        while self._exit is None:
            match await self._process.receive():
                case OutputChunk(data=data):
                    return data
                case ProcessExit() as exit_:
                    self._exit = exit_
        if self._exit.code != 0:
            raise Unreachable("the simulated guest's end of the connection broke: connection reset.")
        return b""

    async def wait_closed(self) -> None:
        """Return once the service has ended, and who uses it too."""
        while await self.receive_some():
            pass
        await self._sent_all.wait()

    async def aclose(self) -> None:
        """Let go of it."""
        await self._link.release(self._process)


class SimulatedProcess:
    """A process in a simulated guest: the `Process` protocol. *id* and *pid* are the guest's."""

    def __init__(self, process_id: int, link: SimulatedGuestLink, offset: int) -> None:
        self.id = process_id
        self.pid = 0
        self.stdin_window = 0
        self.stdin_taken = 0
        self.end_: ProcessExit | None = None
        self.changed = trio.lowlevel.ParkingLot()
        self.dropped = False
        self.released = False
        self._link = link
        self._expected = offset
        self._output: deque[OutputChunk] = deque()

    def take(self, event: dict[str, Any]) -> None:
        """Hear from the guest."""
        match event["event"]:
            case "output" if not self.dropped:
                data = base64.b64decode(event["data"])
                self._output.append(OutputChunk(stream=event["stream"], data=data, offset=event["offset"]))
            case "consumed":
                self.stdin_window += event["bytes"]
            case "exit":
                self.end_ = ProcessExit(
                    code=event["code"],
                    signal=event["signal"],
                    usage=Usage(user_secs=0.0, system_secs=0.0, rss_max_kib=0),
                )
            case "released":
                self.released = True
        self.changed.unpark_all()

    def drop(self) -> None:
        """Hear no more of it."""
        self.dropped = True
        self._output.clear()
        self.changed.unpark_all()

    async def receive(self) -> OutputChunk | Gap | ProcessExit:
        """Return the next output, a gap before it, or how the process ended."""
        await trio.lowlevel.checkpoint()
        while True:
            if self._output:
                if self._output[0].offset > self._expected:
                    start, self._expected = self._expected, self._output[0].offset
                    return Gap(start=start, end=self._expected)
                chunk = self._output.popleft()
                self._expected = chunk.end
                self._link.post({"op": "credit", "id": self.id, "bytes": len(chunk.data)})
                return chunk
            if self.end_ is not None:
                return self.end_
            if self._link.gone:
                raise self._link.lost()
            if self.dropped:
                raise BackendError("this process was released; nothing more is known about it.")
            await self.changed.park()

    async def send_stdin(self, data: bytes) -> None:
        """Write to the process' stdin."""
        view = memoryview(data)
        while view and self.end_ is None and not self.dropped:
            if self._link.gone:
                raise self._link.lost()
            size = min(self.stdin_window, _STDIN_PIECE_BYTES, len(view))
            if size == 0:
                await self.changed.park()
                continue
            self.stdin_window -= size
            self.stdin_taken += size
            self._link.post({"op": "stdin", "id": self.id, "data": base64.b64encode(view[:size]).decode()})
            view = view[size:]

    async def close_stdin(self) -> None:
        """Let the process see the end of its input."""
        self._link.post({"op": "stdin", "id": self.id, "data": None})

    async def signal(self, signo: int) -> None:
        """Send *signo* to the process."""
        self._link.post({"op": "signal", "id": self.id, "signo": signo})

    async def resize(self, size: TerminalSize) -> None:
        """Change the size of the process' terminal."""
        self._link.post({"op": "resize", "id": self.id, "columns": size.columns, "rows": size.rows})

    async def end(self, grace_secs: float) -> None:
        """Ask the process to end."""
        self._link.post({"op": "end", "id": self.id, "grace_secs": grace_secs})
