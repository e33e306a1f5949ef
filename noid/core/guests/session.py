"""One process of a VM as the host has it: what it wrote, how it ended, who reads it at which offset.

See `noid.core.guests.vmsessions` for what keeps it up to date.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

import trio

from noid.core.backends import Process
from noid.core.guests.filewatch import Changes
from noid.core.guests.processlog import ProcessLog
from noid.core.model.guest_processes import GuestProcessInfo, OutputChunk, ProcessExit
from noid.core.model.processes import Gap, TerminalSize
from noid.core.model.times import now
from noid.errors import BackendError, DependencyDown, InvalidRequest, LineageEnded, NoidError

GRACE_SECS = 2.0
END_BOUND_SECS = 5.0
HELD_BYTES = 256 << 10
TYPING_SECS = 5.0
OFFSET_MAX = 1 << 62
LABEL_ARGV_CHARACTERS = 1024

NATIVE, REWOUND, FORKED_COPY = "native", "rewound", "forked-copy"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """What we write on a process when it is started, for whoever finds it: a later agent, a clone's agent.

    A guest gives it back, so nothing in it is believed beyond its own VM.
    """

    argv: tuple[str, ...]
    vm_id: str
    instance: str
    detached: bool
    created_at: str

    @classmethod
    def of(cls, argv: tuple[str, ...], *, vm_id: str, instance: str, detached: bool) -> Label:
        """Return the label of a process that is started now."""
        return cls(
            argv=_cut_argv(argv), vm_id=vm_id, instance=instance, detached=detached, created_at=now().isoformat()
        )

    def to_text(self) -> str:
        """Return it as the guest keeps it: pure ASCII, well below `LABEL_BYTES_MAX`."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return json.dumps(fields, separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> Label:
        """Return what *text* says; of what it does not say, or says wrongly, nothing."""
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            fields = None
        fields = fields if isinstance(fields, dict) else {}
        argv = fields.get("argv")
        words = {name: value if isinstance(value := fields.get(name), str) else "" for name in _LABEL_WORDS}
        return cls(
            argv=_cut_argv([a for a in argv if isinstance(a, str)] if isinstance(argv, list) else []),
            detached=fields.get("detached") is True,
            **words,
        )


_LABEL_WORDS = ("vm_id", "instance", "created_at")


def _cut_argv(argv: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """Return what of *argv* is kept to recognise a process by."""
    kept, room = [], LABEL_ARGV_CHARACTERS
    for argument in argv:
        if room <= 0:
            break
        kept.append(argument if len(argument) <= room else f"{argument[:room]}...")
        room -= len(argument) + 1
    return tuple(kept)


class Owner(Protocol):
    """Whose process it is: see `noid.core.guests.vmsessions.VmSessions`."""

    vm_id: str
    instance: str

    async def leave(self, session: Session, *, goodbye: bool) -> None:
        """The client that started *session* leaves it, on purpose or not."""
        ...

    async def detach(self, session: Session) -> None:
        """Let *session* run on without its client."""
        ...

    async def finish(self, session: Session) -> None:
        """End and forget *session*."""
        ...


class Viewer:
    """One reader of a session, at its own *offset*: that of the next byte it shall get."""

    def __init__(self, session: Session, offset: int, *, holds: bool) -> None:
        self.session = session
        self.offset = offset
        self.holds = holds
        self.typing = trio.CancelScope()
        """What its client types is typed in here. It is over when the client has come back over another connection."""

    async def next(self) -> list[OutputChunk | Gap] | ProcessExit:
        """Return what follows, waiting for it, or how the process ended. Cancelled, it has taken nothing.

        Raises:
            Conflict: the VM was put back to a checkpoint; what it runs now is of another lineage.
            DependencyDown: the VM or its guest is gone.
        """
        session = self.session
        while True:
            if self.offset < session.log.end:
                return await session.log.read(self.offset)
            if session.exit is not None:
                return session.exit
            session.check()
            await session.changed.park()

    def passed(self, event: OutputChunk | Gap) -> None:
        """Note that *event* has reached the client, so that the process may go on."""
        self.offset = event.end
        if self.holds:
            self.session.changed.unpark_all()


class Session:
    """One process of one VM.

    Attributes:
        id: Names it for the life of the guest, across checkpoints and forks. `name` is that as eight hex digits.
        lineage: Whose process it is: the machine's instance.
        origin: ``native``, ``rewound`` or ``forked-copy``.
        exit: How it ended, once it has and all its output is in `log`.
        log: What it wrote; *changes* tells whoever follows it that there is more, or that it has ended.
        viewers: How many clients are attached, and *owners* how many of them speak for whoever started it.
    """

    def __init__(self, info: GuestProcessInfo, label: Label, log: ProcessLog, *, owner: Owner) -> None:
        self.id = info.id
        self.pid = info.pid
        self.tty = info.tty
        self.stdin = info.stdin
        self.label = label
        self.argv = label.argv
        self.detached = label.detached
        self.owner = owner
        self.lineage = owner.instance
        self.origin = origin_of(label, owner.vm_id, owner.instance)
        self.started_at_unix_ns = info.started_at_unix_ns
        self.started_at = _moment(info.started_at_unix_ns)
        self.log = log
        self.exit: ProcessExit | None = None
        self.failure: NoidError | None = None
        self.changed = trio.lowlevel.ParkingLot()
        self.changes = Changes()
        self.viewers = 0
        self.owners = 0
        self.scope = trio.CancelScope()
        self.process: Process | None = None
        self.is_attached = False
        self.stdin_ended = False
        self._typing = trio.StrictFIFOLock()
        self._holders: list[Viewer] = []

    @property
    def name(self) -> str:
        """The id as clients write it."""
        return process_name(self.id)

    @property
    def state(self) -> str:
        """``running``, ``exited``, or ``lost``: nobody will ever know."""
        if self.exit is not None:
            return "exited"
        return "running" if self.failure is None else "lost"

    def check(self) -> None:
        """Raise why nothing more will come of the process, if that is so."""
        if self.failure is not None:
            raise _again(self.failure) from self.failure  # its own traceback for each

    # --- what clients do ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def view(self, offset: int | None, *, holds: bool = False) -> Iterator[Viewer]:
        """Attach a reader at *offset*; None is the first byte that is kept. With *holds* it replaces the holder."""
        viewer = Viewer(self, self.log.start if offset is None else offset, holds=holds)
        if holds:
            for replaced in self._holders:
                replaced.typing.cancel()
            self._holders[:] = [viewer]
        self.viewers += 1
        self.owners += holds
        self.changed.unpark_all()
        try:
            yield viewer
        finally:
            self.viewers -= 1
            self.owners -= holds
            self.changed.unpark_all()

    def let_go(self) -> None:
        """Nobody holds the process back any more."""
        self._holders.clear()
        self.changed.unpark_all()

    async def ended(self) -> ProcessExit:
        """Return how the process ended, once it has.

        Raises:
            Conflict, DependencyDown: see `Viewer.next`.
        """
        await trio.lowlevel.checkpoint()
        while self.exit is None:
            self.check()
            await self.changed.park()
        return self.exit

    async def send_stdin(self, data: bytes) -> None:
        """Write to the process' stdin; waits while it does not read. Ignored once it has ended or closed its stdin.

        Writers take turns. Cancelled, a part was written: see `stdin_taken`.

        Raises:
            InvalidRequest: it was started without.
            Conflict, DependencyDown: see `Viewer.next`.
        """
        if not self.stdin:
            raise InvalidRequest(f"process {self.name} takes no input: it was started without stdin.")
        async with self._typing:
            behind: int | None = None
            while (process := await self._attached()) is not None:
                if behind is None:
                    behind = process.stdin_taken + len(data)
                try:
                    # Attached again after the connection to the guest was lost, this goes on where that broke off.
                    await process.send_stdin(data[len(data) - max(behind - process.stdin_taken, 0) :])
                except InvalidRequest:
                    return  # it has closed its stdin
                except NoidError:
                    await self._until_replaced(process)
                else:
                    return

    async def close_stdin(self) -> None:
        """Let the process see the end of its input."""
        if not self.stdin:
            return
        async with self._typing:
            process = await self._attached()
            self.stdin_ended = True
            if process is not None:
                await process.close_stdin()

    async def stdin_taken(self) -> int | None:
        """Return how much input the process has been given, None if it takes none (any more) or that is not known.

        Waits until nobody is about to give it some, `TYPING_SECS` at most.
        """
        taken = None
        if self.stdin:
            with trio.move_on_after(TYPING_SECS):
                async with self._typing:
                    process = await self._attached()
                    taken = None if process is None else process.stdin_taken
        return taken

    async def _until_replaced(self, process: Process) -> None:
        """Wait until *process*, whose connection is broken, has a successor or none will come."""
        while self.process is process and self.exit is None:
            self.check()
            await self.changed.park()

    async def signal(self, signo: int) -> None:
        """Send *signo* to the process' group. An ended one is not signalled."""
        process = await self._attached()
        if process is not None:
            await process.signal(signo)

    async def resize(self, size: TerminalSize) -> None:
        """Change the size of its terminal, if it has one."""
        process = await self._attached()
        if process is not None:
            await process.resize(size)

    async def end(self, grace_secs: float = GRACE_SECS) -> None:
        """End the process' group: TERM, KILL after the grace. Returns when it has ended, or after a bound.

        Raises:
            Conflict, DependencyDown: see `Viewer.next`.
        """
        process = await self._attached()
        if process is not None:
            self.let_go()  # its last output must get past whoever does not read
            await process.end(grace_secs)
            with trio.move_on_after(grace_secs + END_BOUND_SECS):
                await self.ended()

    async def _attached(self) -> Process | None:
        """Return the guest's process, waiting until it is attached again; None once it has ended."""
        await trio.lowlevel.checkpoint()
        while not self.is_attached and self.exit is None:
            self.check()
            await self.changed.park()
        return self.process if self.exit is None else None

    # --- what its pump does -------------------------------------------------------------------------------------------

    async def attached(self, process: Process) -> None:
        """Note that *process* is the guest's again, over another connection perhaps."""
        self.is_attached = True
        self.changed.unpark_all()
        if self.stdin_ended:
            await process.close_stdin()  # the end may have been lost with the last connection

    async def room(self) -> None:
        """Wait while whoever holds the process back has not read what there is."""
        while any(self.log.end - holder.offset > HELD_BYTES for holder in self._holders):
            await self.changed.park()

    async def take(self, event: OutputChunk | Gap) -> None:
        """Keep what the guest sent."""
        if event.end > OFFSET_MAX:
            raise BackendError(f"the guest says that process {self.name} wrote {event.end} bytes, which nobody can.")
        due = self.log.append(event)
        self.changes.note()
        self.changed.unpark_all()
        if due:
            await self.log.save()

    def over(self, exit_: ProcessExit | None, failure: NoidError | None) -> None:
        """Note the end, or why nobody will know it. The first one counts."""
        if self.exit is None and self.failure is None:
            self.exit, self.failure = exit_, failure
            self.changes.note()
            self.is_attached = False
            self.changed.unpark_all()
            if failure is not None:
                self.scope.cancel()

    def description(self) -> dict[str, Any]:
        """Return what a later agent shall know of it if the guest is gone."""
        exit_ = None if self.exit is None else {"code": self.exit.code, "signal": self.exit.signal}
        fields: dict[str, Any] = {"pid": self.pid, "tty": self.tty, "exit": exit_}
        return fields | {
            "started_at_unix_ns": self.started_at_unix_ns,
            "label": self.label.to_text(),
            "detached": self.detached,
        }

    @classmethod
    def described(cls, name: str, fields: Mapping[str, Any], log: ProcessLog, *, owner: Owner) -> Session:
        """Return the session of *fields*, a `description`, whose process the guest no longer knows.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        exit_ = fields["exit"]
        info = GuestProcessInfo(
            id=int(name, 16),
            pid=fields["pid"],
            running=False,
            tty=fields["tty"],
            stdin=False,
            log_start=log.start,
            log_end=log.end,
            exit=None if exit_ is None else ProcessExit(code=exit_["code"], signal=exit_["signal"]),
            started_at_unix_ns=fields["started_at_unix_ns"],
            label=fields["label"],
        )
        session = cls(info, Label.from_text(info.label), log, owner=owner)
        gone = DependencyDown(f"process {name} is gone with the machine it ran on; nobody knows how it ended.")
        session.over(info.exit, None if info.exit is not None else gone)
        return session


def _again(failure: NoidError) -> NoidError:
    return LineageEnded() if isinstance(failure, LineageEnded) else type(failure)(*failure.args)


def origin_of(label: Label, vm_id: str, instance: str) -> str:
    """Return whether a process found on a machine was started there, or continues from a checkpoint, and whose."""
    if label.instance == instance:
        return NATIVE
    return REWOUND if label.vm_id == vm_id else FORKED_COPY


def process_name(process_id: int) -> str:
    """Return the id of a process as clients write it."""
    return f"{process_id:08x}"


def _moment(unix_ns: int) -> datetime | None:
    """Return a time a guest told, or None if it cannot be one."""
    try:
        return datetime.fromtimestamp(unix_ns / 1e9, UTC)
    except (OverflowError, ValueError, OSError):
        return None
