"""The processes of one machine, which outlive their clients, this agent, pauses, restores and forks.

The guest is the truth: it keeps each process and the latest of its output, numbered from 0. One task for each process
here, its *pump*, copies that into a `ProcessLog`, from which any number of clients read at their own offsets. After a
``kill -9`` the next agent lists the guest's processes and goes on where the logs on disk end: nothing twice, nothing
missing that the guest still has, and a recorded gap for what it has not.

A machine's *instance* is the lineage of its processes. What an in-place restore or a fork continues is a copy: it is
listed as ``rewound`` or ``forked-copy``, has another lineage, and its output never reaches the original's clients.

The client that started a process holds it back when it reads slowly; others never do, they are told of a gap.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import trio

from noid.core.backends import Guest, Process
from noid.core.guests.processlog import MEMORY_BYTES, ProcessLog, descriptions
from noid.core.guests.session import NATIVE, Label, Session, process_name
from noid.core.model.guest_processes import GuestProcessInfo, ProcessExit
from noid.core.model.processes import ExecRequest
from noid.core.model.times import now
from noid.core.vms.supervisor import Live
from noid.errors import (
    BackendError,
    Conflict,
    DeadlineExceeded,
    DependencyDown,
    InvalidRequest,
    LineageEnded,
    NoidError,
    NotFound,
    Unsupported,
)

logger = logging.getLogger(__name__)

CONNECT_SECS = 10.0
RELEASE_SECS = 10.0
RECONNECT_SECS = 30.0
RETRY_SECS = (0.05, 2.0)
FAILURES_MAX = 5
PROCESSES_MAX = 512
ENDED_MAX = 64


class VmSessions:
    """The sessions of one machine, and of a machine that has ended as long as its directory is there.

    *live* is None when the machine has ended before this agent began.
    """

    def __init__(
        self, vm_id: str, instance: str, directory: Path, live: Live | None, nursery: trio.Nursery, reattach_secs: float
    ) -> None:
        self.vm_id = vm_id
        self.instance = instance
        self._directory = directory
        self._live = live
        self._nursery = nursery
        self._reattach_secs = reattach_secs
        self._sessions: dict[int, Session] = {}
        self._starting = 0
        self._lasting = False  # whether processes outlive the connection they were started over
        self._known = trio.Event()
        self._scope = trio.CancelScope()
        self._failure: NoidError | None = None

    # --- what there is ------------------------------------------------------------------------------------------------

    async def all(self) -> list[Session]:
        """Return the processes there are, oldest first.

        Raises:
            DeadlineExceeded: the guest has not told yet.
        """
        await self._wait_until_known()
        return sorted(self._sessions.values(), key=lambda session: (session.started_at_unix_ns, session.pid))

    async def get(self, name: str, lineage: str | None = None) -> Session:
        """Return the process *name*, eight hex digits. With *lineage* only if it is of that one.

        Raises:
            InvalidRequest: *name* is none.
            NotFound: there is no such process.
            LineageEnded: the VM has been put back to a checkpoint since.
            DeadlineExceeded: the guest has not told yet.
        """
        if len(name) != 8 or not set(name) <= set("0123456789abcdef"):
            raise InvalidRequest(f"{name!r} is no process: it is named by 8 of the digits 0-9 and a-f.")
        if lineage is not None and lineage != self.instance:
            raise LineageEnded()
        await self._wait_until_known()
        session = self._sessions.get(int(name, 16))
        if session is None:
            raise NotFound(f"process '{name}' not found")
        return session

    @property
    def running(self) -> int:
        """How many run, or are being started."""
        return self._starting + sum(s.exit is None and s.failure is None for s in self._sessions.values())

    async def known(self) -> None:
        """Wait until it is known what runs; for a guest that does not tell, `CONNECT_SECS`."""
        with contextlib.suppress(DeadlineExceeded):
            await self._wait_until_known()

    async def _wait_until_known(self) -> None:
        if not self._known.is_set():
            with trio.move_on_after(CONNECT_SECS):
                await self._known.wait()
        if not self._known.is_set():
            raise DeadlineExceeded(
                f"the guest has not told its processes (waited {CONNECT_SECS:g} s). It may be busy or hung: try again, "
                "look at its console, or restore the VM from a checkpoint."
            )

    # --- start and end ------------------------------------------------------------------------------------------------

    async def start(self, guest: Guest, request: ExecRequest, *, detached: bool, admit: Callable[[], None]) -> Session:
        """Start a process in *guest*, which is this machine's. Cancelled, there is none.

        One that is not *detached* is its starter's to `finish`. *admit* raises if it may not be started; it is asked
        once the guest has told what runs, at the instant from which this one counts.

        Raises:
            Unsupported: this way into the guest cannot do what is asked.
            Conflict: there are too many processes.
            InvalidRequest, DependencyDown: see `Guest.start`.
        """
        for wanted, feature, ability in (
            (detached, "sessions", "run a process that outlives its client"),
            (request.tty is not None, "tty", "give a process a terminal"),
            (request.stdin, "stdin", "give a process input"),
        ):
            if wanted and feature not in guest.features:
                raise Unsupported("exec", ability)
        await self._wait_until_known()
        if len(self._sessions) + self._starting >= PROCESSES_MAX:
            raise Conflict(f"the VM has {PROCESSES_MAX} processes, which is the most. End one (`noid kill`) first.")
        label = Label.of(request.argv, vm_id=self.vm_id, instance=self.instance, detached=detached)
        admit()
        self._starting += 1
        try:
            process = await guest.start(dataclasses.replace(request, label=label.to_text()))
        finally:
            self._starting -= 1
        self._lasting = "sessions" in guest.features
        info = GuestProcessInfo(
            id=process.id if self._lasting else secrets.randbits(32),
            pid=process.pid,
            running=True,
            tty=request.tty is not None,
            stdin=request.stdin,
            log_start=0,
            log_end=0,
            exit=None,
            started_at_unix_ns=int(now().timestamp() * 1e9),
            label=label.to_text(),
        )
        log = ProcessLog(self._processes, process_name(info.id), unsaved_bytes=request.log_bytes // 4)
        session = Session(info, label, log, owner=self)
        session.process, session.is_attached = process, True
        self._sessions[session.id] = session
        if self._failure is not None:
            session.over(None, self._failure)
        else:
            self._nursery.start_soon(self._pump, session, guest)
        return session

    async def leave(self, session: Session, *, goodbye: bool) -> None:
        """Whoever started *session* leaves it. Said *goodbye*, it is ended; without, it waits for its client.

        A detached one runs on. One whose machine is gone stays to be looked at.
        """
        if session.detached:
            session.let_go()
        elif session.failure is not None:
            return
        elif not goodbye:
            self._nursery.start_soon(self._expect_client, session)
        elif session.exit is not None:
            self._nursery.start_soon(self.finish, session)
        else:
            await self.finish(session)

    async def detach(self, session: Session) -> None:
        """Let *session* run on without its client, also after this agent: its label, in the guest, cannot say so.

        Raises:
            Unsupported: processes of this guest do not outlive their connection.
        """
        if not self._lasting:
            raise Unsupported("exec", "run a process that outlives its client")
        if not session.detached:
            session.detached = True
            await session.log.describe(session.description())

    async def finish(self, session: Session) -> None:
        """End *session* if it runs, and forget it, here and in the guest. Twice does nothing."""
        if self._sessions.get(session.id) is not session:
            return
        with trio.move_on_after(RELEASE_SECS, shield=True):
            try:
                if session.exit is None and session.failure is None:
                    await session.end()
                if self._live is not None:
                    async with self._guest(self._live) as guest:
                        await guest.release(session.id if session.process is None else session.process)
            except NoidError as error:  # the guest is gone, and its processes with it
                logger.info("could not release process %s: %s", session.name, error, extra={"vm": self.vm_id})
            session.over(None, NotFound(f"process '{session.name}' not found"))
            if self._sessions.get(session.id) is session:
                del self._sessions[session.id]
            session.scope.cancel()
            try:
                await session.log.remove()
            except NoidError as error:  # it goes with the VM's directory
                logger.warning("%s", error, extra={"vm": self.vm_id})

    async def _expect_client(self, session: Session) -> None:
        while session.failure is None:
            with trio.move_on_after(self._reattach_secs):
                while session.viewers == 0:
                    await session.changed.park()
            if session.owners:
                return  # which decides anew when it leaves
            if session.viewers == 0:
                await self.finish(session)
                return
            while session.viewers and not session.owners:
                await session.changed.park()

    # --- the guest's side ---------------------------------------------------------------------------------------------

    @property
    def _processes(self) -> Path:
        return self._directory / "processes"

    @contextlib.asynccontextmanager
    async def _guest(self, live: Live) -> AsyncIterator[Guest]:
        guest = live.link.open_guest
        if guest is None:
            try:
                with trio.fail_after(CONNECT_SECS):
                    guest = await live.link.connected()
            except trio.TooSlowError as error:
                raise DeadlineExceeded(f"the guest did not answer within {CONNECT_SECS:g} s.") from error
        async with live.link.using(guest):
            yield guest

    async def discover(self) -> None:
        """Learn of every process there is: from the guest, and of those it no longer knows from disk."""
        try:
            with self._scope:
                described = await self._described()
                for info in await self._listed():
                    await self._adopt(info, described.pop(process_name(info.id), {}))
                for name, fields in described.items():
                    await self._remember(name, fields)
                self._known.set()
        except Exception:  # one VM must not end the agent
            logger.exception("the processes of VM %s cannot be listed", self.vm_id)

    async def _described(self) -> dict[str, dict[str, Any]]:
        try:
            return await trio.to_thread.run_sync(descriptions, self._processes)
        except (NoidError, OSError) as error:
            logger.warning("what earlier agents knew of processes is lost: %s", error, extra={"vm": self.vm_id})
            return {}

    async def _listed(self) -> list[GuestProcessInfo]:
        """Ask the guest for as long as its machine is ours."""
        delay_secs, most_secs = RETRY_SECS
        while self._live is not None:
            try:
                async with self._guest(self._live) as guest:
                    if "sessions" not in guest.features:
                        return []
                    self._lasting = True
                    with trio.fail_after(CONNECT_SECS):
                        listed = await guest.processes()
            except (NoidError, trio.TooSlowError) as error:
                logger.info("a guest has not told its processes yet: %s", error, extra={"vm": self.vm_id})
                await trio.sleep(delay_secs)
                delay_secs = min(2 * delay_secs, most_secs)
                continue
            if len(listed) > PROCESSES_MAX:
                logger.warning("a guest tells of %d processes", len(listed), extra={"vm": self.vm_id})
            return [info for info in listed[:PROCESSES_MAX] if info.label]
        return []

    async def _adopt(self, info: GuestProcessInfo, described: dict[str, Any]) -> None:
        name = process_name(info.id)
        open_log = partial(ProcessLog.open, self._processes, name, unsaved_bytes=MEMORY_BYTES // 4)
        try:
            log = await trio.to_thread.run_sync(open_log)
        except OSError as error:
            logger.warning("the log of process %s cannot be read: %s", name, error, extra={"vm": self.vm_id})
            log = ProcessLog(self._processes, name, has_files=True)
        session = Session(info, Label.from_text(info.label), log, owner=self)
        session.detached = session.detached or described.get("detached") is True
        self._sessions[info.id] = session
        self._nursery.start_soon(self._pump, session, None)
        if session.origin == NATIVE and not session.detached:
            self._nursery.start_soon(self._expect_client, session)

    async def _remember(self, name: str, fields: dict[str, Any]) -> None:
        try:
            log = await trio.to_thread.run_sync(ProcessLog.open, self._processes, name)
            session = Session.described(name, fields, log, owner=self)
        except (OSError, KeyError, TypeError, ValueError) as error:
            logger.warning("process %s is not what noid wrote: %s", name, error, extra={"vm": self.vm_id})
            return
        self._sessions[session.id] = session

    async def _pump(self, session: Session, guest: Guest | None) -> None:
        """Copy what the guest sends until the process has ended, over as many connections as that takes.

        *guest* is whose `session.process` is attached already, if any.
        """
        try:
            with session.scope:
                ended, failure = await self._copy(session, guest)
                session.over(ended, failure)
            if session.detached or session.origin != NATIVE or session.failure is not None:
                await self._keep(session)
                await self._drop_oldest()
        except Exception:  # one process must not end the agent
            logger.exception("process %s is no longer followed", session.name, extra={"vm": self.vm_id})
            session.over(None, BackendError("internal error: nobody follows this process any more."))

    async def _copy(self, session: Session, guest: Guest | None) -> tuple[ProcessExit | None, NoidError | None]:
        """Return how the process ended, or why nobody will know."""
        failures, delay_secs, since = 0, RETRY_SECS[0], trio.current_time()
        while self._live is not None:
            before = session.log.end
            try:
                async with self._guest(self._live) as current:
                    if session.process is None or current is not guest:
                        with trio.fail_after(CONNECT_SECS):
                            session.process = await current.attach(session.id, session.log.end)
                        guest = current
                    await session.attached(session.process)
                    return await self._receive(session, session.process), None
            except NotFound as error:
                return None, DependencyDown(f"{error} It was started again, perhaps: its processes are gone.")
            except (NoidError, trio.TooSlowError) as error:
                session.is_attached, guest = False, None
                progressed = session.log.end > before
                failures = 0 if progressed else failures + 1
                since = trio.current_time() if progressed else since
                too_often = failures >= FAILURES_MAX and isinstance(error, BackendError)
                if not self._lasting or too_often or trio.current_time() - since > RECONNECT_SECS:
                    return None, error if isinstance(error, NoidError) else DeadlineExceeded("the guest is silent.")
                logger.info("process %s is attached again: %s", session.name, error, extra={"vm": self.vm_id})
                await trio.sleep(delay_secs)
                delay_secs = min(2 * delay_secs, RETRY_SECS[1])
        return None, self._failure

    async def _receive(self, session: Session, process: Process) -> ProcessExit:
        while True:
            await session.room()
            event = await process.receive()
            if isinstance(event, ProcessExit):
                return event
            await session.take(event)

    async def _keep(self, session: Session) -> None:
        """Write down an ended session, so that it can be looked at when its machine is gone."""
        await session.log.save()
        await session.log.describe(session.description())

    async def _drop_oldest(self) -> None:
        over = [s for s in self._sessions.values() if s.state != "running" and s.viewers == 0]
        for session in over[:-ENDED_MAX]:
            await self.finish(session)

    # --- the machine's end --------------------------------------------------------------------------------------------

    def close(self, why: NoidError, *, keep: bool) -> None:
        """The machine is gone, or somebody else's: nothing more will come. *keep* what there is for later readers."""
        running = [s for s in self._sessions.values() if s.state == "running"]
        self._live, self._failure = None, why
        self._scope.cancel()
        self._known.set()
        for session in running:
            session.over(None, why)
            if not keep:
                session.log.abandon()

    async def save(self) -> None:
        """Write down what would otherwise only be in memory and in the guest."""
        for session in list(self._sessions.values()):
            if session.log.unsaved_bytes and (session.detached or session.exit is None):
                await self._keep(session)
