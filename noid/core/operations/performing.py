"""Performing: a saga carried out as an operation, which has an id, can be looked at, waited for and cancelled.

The journal is where operations live: a row begins with the first transaction of its saga and gets its result in the
last one. What this module adds is the part that runs, for as long as it does.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import trio

from noid.core.backends import Event
from noid.core.checkpoints.templates import Templates
from noid.core.database.store import Tx
from noid.core.model.times import now
from noid.core.model.users import User
from noid.core.model.vms import Vm, VmSpec
from noid.core.operations import calls, journal, saga
from noid.core.operations.calls import Call
from noid.core.operations.outcomes import Operation, OperationState, Outcome
from noid.core.operations.records import to_json
from noid.core.operations.running import Operations
from noid.core.operations.saga import Facts, Progress, Saga
from noid.core.operations.work import Work
from noid.core.services import Services
from noid.core.vms.sight import seen_by
from noid.errors import Conflict, NoidError, NotFound, OperationCancelled

logger = logging.getLogger(__name__)

AFTER_SECS = 30.0
#: How long an operation that has ended can be looked at, and a key's answer be repeated.
KEPT = timedelta(hours=24)
#: How long it stays in the journal, where recovery looks for what machines there have been.
REMEMBERED = timedelta(days=30)
FORGET_SECS = 3600.0
#: How long after an undo that has failed it is tried again: at first, and at most.
UNDO_AGAIN_SECS = 1.0
UNDO_AGAIN_SECS_MAX = 60.0


@dataclass(slots=True, kw_only=True, eq=False)
class Performance(Progress):
    """An operation while it runs."""

    table: Saga[Work]
    owner: str
    vm_name: str
    facts: Facts
    work: Work
    call: Call | None = None
    started_at: datetime = field(default_factory=now)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    done: trio.Event = field(default_factory=trio.Event)
    outcome: Outcome | None = None
    on_open: Callable[[Performance], None] | None = None

    def opening(self, tx: Tx) -> None:
        """Write what the call wants written in the same transaction."""
        if self.call is not None and self.call.opening is not None:
            self.call.opening(tx, self.operation)

    def opened(self) -> None:
        """Tell whoever asked."""
        if self.on_open is not None:
            self.on_open(self)
        if self.call is not None:
            self.call.begin(self.operation)

    def result(self, tx: Tx) -> Mapping[str, Any]:
        """Make the outcome, from what the commit has just written, and keep it."""
        self.outcome = outcome_of(tx, self)
        return dict(to_json(self.outcome))

    def view(self) -> Operation:
        """Return the operation as it is now."""
        return Operation(
            id=self.operation,
            kind=self.table.kind,
            owner=self.owner,
            vm=self.vm_name,
            state=OperationState.RUNNING,
            step=self.step,
            started_at=self.started_at,
            timings=dict(self.timings),
        )

    def success(self) -> Operation | None:
        """Return the operation as it has ended just now, if it is committed: what its row says, without reading it."""
        if self.outcome is None or not self.committed:
            return None
        return replace(
            self.view(), state=OperationState.SUCCEEDED, step=None, ended_at=now(), timings=self.outcome.timings
        )


def outcome_of(tx: Tx, performance: Performance) -> Outcome:
    """Return what the operation has come to, inside the transaction that commits it."""
    facts, work, timings = performance.facts, performance.work, dict(performance.timings)
    if "pause_secs" in facts:
        timings["pause"] = facts["pause_secs"]
    vm_id = facts.get("vm_id") or (work.vm.id if work.vm is not None else None)
    vm = None if vm_id is None else tx.find(vm_id)
    if vm is not None:
        vm = seen_by(vm, work.link)
    return Outcome(
        kind=performance.table.kind,
        operation=performance.operation,
        vm=vm,
        checkpoint=work.checkpoint,
        timings=timings,
        changed_bytes=facts.get("changed_bytes"),
        how=facts.get("how"),
    )


class Performer:
    """Carries out sagas as operations. Whoever asks for one of a user's sees that user's only."""

    def __init__(self, services: Services, operations: Operations, templates: Templates) -> None:
        self._services = services
        self._templates = templates
        self._store = services.store
        self._operations = operations
        self._live: dict[str, Performance] = {}

    def work(self, user: User, *, vm: Vm | None = None, spec: VmSpec | None = None) -> Work:
        """Return the live objects of an operation that *user* asks for, which is about *vm* or makes *spec*."""
        return Work(services=self._services, templates=self._templates, user=user, vm=vm, spec=spec)

    async def run(
        self,
        table: Saga[Work],
        what: str,
        user: User,
        vm_names: tuple[str, ...],
        facts: Facts,
        work: Work,
        *,
        after: Callable[[], Awaitable[None]] | None = None,
        vm_name: str | None = None,
    ) -> Outcome:
        """Carry out *table* as an operation; hold its machine, tell of it, and finish with *after*.

        It is about the VM *vm_name*, else about the first of the *vm_names* that it holds. Cancelling the caller
        changes nothing.

        What could not be undone is tried again, with the VMs still held and the operation still running, when the error
        was raised already.

        Raises:
            Busy: names the operation that holds one of the VMs.
            OperationCancelled: somebody asked for that; what had begun is undone.
            DependencyDown: the agent is stopping.
            NoidError: what the steps raise; what had begun is undone.
        """
        performance = Performance(
            table=table,
            owner=user.id,
            vm_name=vm_name or vm_names[0],
            facts=facts,
            work=work,
            call=calls.CURRENT.get(),
            on_open=self._opened,
        )

        def settle() -> None:
            if performance.call is not None:
                performance.call.settle()

        async def job() -> Outcome:
            calls.CURRENT.set(None)  # this task's own: what it starts is not what was asked for
            try:
                return await self._perform(performance, what, after)
            finally:
                settle()
                if performance.undo_again is None:
                    self._ended(performance)

        async def leftover() -> None:
            if performance.undo_again is not None:
                try:
                    await _until_undone(performance, performance.undo_again)
                finally:
                    self._ended(performance)

        if performance.call is not None:
            performance.call.is_carried_out = True  # also if whoever made it leaves before the job begins
        try:
            return await self._operations.run(what, user.id, vm_names, job, performance.scope, leftover)
        except OperationCancelled as error:
            raise performance.cancelled or error from None  # in the words that are in the journal
        except NoidError:
            settle()  # there was no job, or it has ended
            raise

    async def _perform(
        self, performance: Performance, what: str, after: Callable[[], Awaitable[None]] | None
    ) -> Outcome:
        table, work, facts = performance.table, performance.work, performance.facts
        owner, vm_name = performance.owner, performance.vm_name
        about = {"op": table.kind, "owner": owner, "vm": vm_name}
        try:
            await saga.run(table, work, self._store, owner=owner, vm_name=vm_name, facts=facts, progress=performance)
        except NoidError as error:
            logger.info("%s of %s failed: %s", what, vm_name, error, extra=about)
            raise
        except Exception:  # a bug; the journal's text refers to this line
            logger.exception("operation %s: %s of %s failed", performance.operation, table.kind, vm_name)
            raise
        # It has happened: from here to the end nothing may be interrupted. The commit itself did not await after its
        # transaction, so there is no instant at which a committed machine has no holder.
        replaced = None
        if work.machine is not None and work.link is not None:  # a new machine has woken
            replaced = self._services.supervisor.hold(facts["vm_id"], facts["instance"], work.machine, work.link)
        with trio.move_on_after(AFTER_SECS, shield=True):
            try:
                if after is not None:
                    await after()
            finally:
                if replaced is not None:
                    await replaced.machine.aclose()
        logger.info("%s %s", what, vm_name, extra=about)
        assert performance.outcome is not None  # noqa: S101  # the commit made it
        self._services.events.tell(
            Event(kind=table.kind, owner=owner, vm=vm_name, facts=_facts_of(performance.outcome))
        )
        return performance.outcome

    # --- looking at them ---------------------------------------------------------------------------------------------

    def get(self, user: User, operation: str) -> Operation:
        """Return *user*'s operation; one that has ended for `KEPT`.

        Raises:
            NotFound: there is none of that id, or it is not theirs, or it ended long ago.
        """
        found = self._now(journal.find(self._store, user.id, operation))
        if found.started_at < now() - KEPT:
            raise NotFound(f"operation {operation!r} not found")
        return found

    def all(
        self,
        user: User,
        *,
        vm: str | None = None,
        state: OperationState | None = None,
        before: str | None = None,
        limit: int = -1,
    ) -> list[Operation]:
        """Return *user*'s operations of the last `KEPT`, newest first; see `journal.find_all`."""
        found = journal.find_all(
            self._store, user.id, since=now() - KEPT, vm=vm, state=state, before=before, limit=limit
        )
        return [self._now(operation) for operation in found]

    async def ended(self, user: User, operation: str) -> Operation:
        """Return *user*'s operation when it has ended.

        Raises:
            NotFound: there is no such operation.
        """
        self.get(user, operation)
        if (performance := self._live.get(operation)) is not None:
            await performance.done.wait()
        return self.get(user, operation)

    def cancel(self, user: User, operation: str) -> Operation:
        """Cancel *user*'s operation: what it has begun is undone, and whoever waits for it hears `OperationCancelled`.

        Returns at once. It may still succeed, if it was about to.

        Raises:
            NotFound: there is no such operation.
            Conflict: it has ended, or it is one that can only go forward.
        """
        found = self.get(user, operation)
        performance = self._live.get(operation)
        if performance is None or performance.committed:
            how = "is about to succeed" if found.state is OperationState.RUNNING else f"has ended ({found.state})"
            raise Conflict(f"operation {operation} {how}: it cannot be cancelled any more.")
        if performance.table.forward:
            raise Conflict(f"a {found.kind} cannot be cancelled: what it has removed cannot be brought back.")
        performance.cancelled = performance.cancelled or OperationCancelled(
            f"{found.kind} of {found.vm!r} was cancelled; what it had begun is undone."
        )
        performance.scope.cancel()
        return found

    def _now(self, operation: Operation) -> Operation:
        performance = self._live.get(operation.id)
        return operation if performance is None else performance.view()

    async def keep_forgetting(self) -> None:
        """Remove what ended `REMEMBERED` ago, once in a while, as every start does. Runs until it is cancelled."""
        while True:
            await trio.sleep(FORGET_SECS)
            try:
                await self._store.write(lambda tx: tx.forget_operations(now() - REMEMBERED))
            except NoidError as error:
                logger.warning("old operations stay in the journal: %s", error)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _opened(self, performance: Performance) -> None:
        self._live[performance.operation] = performance
        facts = {"operation": performance.operation, "kind": performance.table.kind}
        event = Event(kind="operation.start", owner=performance.owner, vm=performance.vm_name, facts=facts)
        self._services.events.tell(event)

    def _ended(self, performance: Performance) -> None:
        known = self._live.pop(performance.operation, None) is not None
        performance.done.set()
        if not known:
            return
        try:
            ended = performance.success() or journal.find(self._store, performance.owner, performance.operation)
        except NoidError as error:  # its owner was removed, or the database cannot be read
            logger.warning("what became of operation %s is not told: %s", performance.operation, error)
            return
        if not ended.interrupted:  # by the end of this agent: the next one will know what became of it
            secs = ((ended.ended_at or now()) - ended.started_at).total_seconds()
            facts: dict[str, Any] = {"operation": ended.id, "kind": ended.kind, "state": ended.state.value}
            facts |= {"secs": secs, "timings": dict(ended.timings)}
            self._services.events.tell(Event(kind="operation.end", owner=ended.owner, vm=ended.vm, facts=facts))


async def _until_undone(performance: Performance, undo_again: Callable[[], Awaitable[bool]]) -> None:
    """Repeat the undo of an operation that has failed until it works: a full disk, or whatever it was, may pass."""
    about = f"{performance.table.kind} of {performance.vm_name}"
    pause_secs = UNDO_AGAIN_SECS
    logger.error("what %s has begun could not be undone; it is tried again until it works", about)
    while True:
        await trio.sleep(pause_secs)
        if await undo_again():
            logger.warning("what %s had begun is undone now", about)
            return
        pause_secs = min(2 * pause_secs, UNDO_AGAIN_SECS_MAX)


def _facts_of(outcome: Outcome) -> dict[str, Any]:
    """Return what is told of something that has happened."""
    facts: dict[str, Any] = {"operation": outcome.operation}
    if outcome.vm is not None:
        facts |= {"state": outcome.vm.state.value, "generation": outcome.vm.generation, "name": outcome.vm.name}
    return facts if outcome.checkpoint is None else facts | {"checkpoint": outcome.checkpoint.id}
