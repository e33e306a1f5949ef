"""Sagas: operations as tables of steps that can each be undone, and the journal that lets a crash be undone too.

The rules, which every step can rely on and must keep:

- Undo covers every step that **began**, in reverse order. The journal has all steps as ``planned`` from the moment it
  opens, so after a crash undo covers those too that never began.
- **Name it before you make it**: facts needed by an undo exist before its step begins (ids, directories), so an undo
  needs nothing only its ``do`` could return. It succeeds when ``do`` never happened, half happened, or was undone. What
  a ``do`` returns is in the journal before the next step begins.
- Facts are JSON: they are what recovery knows in the next process. Live objects belong in the context.
- ``commit`` is one database transaction that holds the saga's last change *and* the journal's ``finished``: an
  operation has happened entirely or, after undo, not at all.
- Undo runs under a shield with its own deadline. If it fails the journal stays open, and it is repeated: by whoever
  ran the saga, who still holds its VMs, and by recovery.
- Why an operation failed is in the journal before its undo begins, so that a crash in between does not change it.
- A ``forward`` saga cannot be undone: what a crash cuts off, recovery carries on, on the same page.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import trio

from noid.core.database.store import Store, Tx
from noid.core.ids import new_id
from noid.core.waiting import is_cancellation
from noid.errors import DeadlineExceeded, NoidError

logger = logging.getLogger(__name__)

C = TypeVar("C")
Facts = dict[str, Any]

UNDO_SECS = 30.0


@dataclass(frozen=True, slots=True)
class Step(Generic[C]):
    """One step. *do* returns facts to add (or None). *undo* None means that an earlier step's undo covers it."""

    name: str
    do: Callable[[C, Facts], Awaitable[Mapping[str, Any] | None]]
    undo: Callable[[C, Facts], Awaitable[None]] | None = None


@dataclass(frozen=True, slots=True)
class Saga(Generic[C]):
    """An operation. *commit* runs inside the transaction that ends it; *deadline_secs* bounds the steps together.

    One that is *forward* has no undo: it cannot be cancelled, and recovery runs its steps again. One that *needs_room*
    is refused on a full disk before it begins; the others may use what is reserved for the database.
    """

    kind: str
    steps: tuple[Step[C], ...]
    commit: Callable[[C, Facts, Tx], None]
    deadline_secs: float
    forward: bool = False
    needs_room: bool = True


@dataclass(slots=True, kw_only=True, eq=False)
class Progress:
    """One run of a saga as others see it while it goes on. Subclasses add to its transactions.

    *operation* is its id, *step* the one it is in, *timings* the seconds of those behind it. *cancelled* is why, where
    somebody cancelled it on purpose; without, a cancellation means that the agent ends. *undo_again* repeats an undo
    that has failed, and returns whether it has worked now; None: there is nothing to undo.
    """

    operation: str = field(default_factory=new_id)
    step: str | None = None
    timings: dict[str, float] = field(default_factory=dict)
    cancelled: NoidError | None = None
    committed: bool = False
    undo_again: Callable[[], Awaitable[bool]] | None = None

    def opening(self, tx: Tx) -> None:
        """Add to the transaction that opens the page."""

    def opened(self) -> None:
        """Hear that the page is in the journal."""

    def result(self, tx: Tx) -> Mapping[str, Any] | None:
        """Return what the page shall keep of the result, as JSON has it; *tx* is the commit's, after the saga's own."""
        del tx
        return None


class Journal:
    """One operation's page in the journal."""

    def __init__(self, store: Store, operation: str, facts: Facts) -> None:
        self._store = store
        self._kept = json.dumps(facts)
        self.operation = operation

    @classmethod
    async def begin(
        cls, store: Store, progress: Progress, saga: Saga[C], owner: str, vm_name: str, facts: Facts
    ) -> Journal:
        """Open a page: from here on, a crash makes recovery undo the operation."""

        def change(tx: Tx) -> None:
            tx.open_operation(progress.operation, saga.kind, owner, vm_name, facts)
            for step in saga.steps:
                tx.note(progress.operation, step.name, "planned")
            progress.opening(tx)

        await store.write(change, needs_room=saga.needs_room)
        progress.opened()
        return cls(store, progress.operation, facts)

    async def keep(self, facts: Facts) -> None:
        """Make *facts* the operation's, unless they are."""
        text = json.dumps(facts)
        if text != self._kept:
            await self._store.write(lambda tx: tx.set_facts(self.operation, facts))
            self._kept = text

    async def note(self, step: str, event: str) -> None:
        """Append ``undoing`` or ``undone`` for *step*."""
        await self._store.write(lambda tx: tx.note(self.operation, step, event))

    async def finish(self, progress: Progress, commit: Callable[[Tx], None]) -> None:
        """Run *commit* and close the page as ``finished``, in one transaction."""

        def change(tx: Tx) -> None:
            commit(tx)
            tx.finish_operation(self.operation, progress.result(tx), progress.timings)

        await self._store.write(change)
        progress.committed = True

    async def failed(self, step: str | None, error: NoidError, timings: Mapping[str, float]) -> None:
        """Say why, and in which step, it failed, before anything is undone. What is said first counts."""

        def change(tx: Tx) -> None:
            if step is not None:
                tx.note(self.operation, step, "failed")
            tx.fail_operation(self.operation, error, timings)

        await self._store.write(change)

    async def unwound(self) -> None:
        """Close the page: everything that began is undone."""
        await self._store.write(lambda tx: tx.close_unwound(self.operation))


async def run(
    saga: Saga[C],
    context: C,
    store: Store,
    *,
    owner: str,
    vm_name: str,
    facts: Facts,
    progress: Progress | None = None,
    page: Journal | None = None,
) -> dict[str, float]:
    """Carry out *saga* and return the seconds each step took.

    *facts* is extended in place. After an error or a cancellation everything that began has been undone (or stays in
    the journal for recovery), and the error is raised. With *page* an earlier agent's operation is carried on.

    Raises:
        DeadlineExceeded: the steps took longer than ``saga.deadline_secs`` together.
    """
    progress = progress or Progress()
    journal = page or await Journal.begin(store, progress, saga, owner=owner, vm_name=vm_name, facts=facts)
    began: list[Step[C]] = []
    try:
        with trio.move_on_after(saga.deadline_secs) as deadline:
            for step in saga.steps:
                await trio.lowlevel.checkpoint_if_cancelled()
                await journal.keep(facts)
                progress.step = step.name
                began.append(step)
                started = time.perf_counter()
                facts.update(await step.do(context, facts) or {})
                progress.timings[step.name] = time.perf_counter() - started
        if deadline.cancelled_caught:
            where = f" in step {began[-1].name!r}" if began else ""
            raise DeadlineExceeded(
                f"{saga.kind} of {vm_name!r} took longer than {saga.deadline_secs:g} s{where} and is being undone. "
                "Try again when the host is less busy."
            )
        await journal.finish(progress, lambda tx: saga.commit(context, facts, tx))
    except BaseException as error:
        if isinstance(error, Exception):
            why: NoidError | None = error if isinstance(error, NoidError) else _bug(progress.operation)
        elif is_cancellation(error) and not saga.forward:  # what only goes forward the next start carries on
            why = progress.cancelled
        else:
            raise  # it ends the agent: the next one undoes
        undo = partial(unwind, saga, context, facts, journal, began, why, progress.timings)
        if not await undo():  # noqa: ASYNC102  # shields itself
            progress.undo_again = undo
        raise
    return progress.timings


async def unwind(
    saga: Saga[C],
    context: C,
    facts: Facts,
    journal: Journal,
    began: list[Step[C]],
    why: NoidError | None,
    timings: Mapping[str, float] | None = None,
) -> bool:
    """Undo the steps that *began*, last first, and close the journal. Return whether all of it worked.

    *why* it failed; None: the agent ended. Each undo has `UNDO_SECS`. One that fails is logged; the others still run,
    and the page stays open so that all of them are repeated: by this agent or by the next start. A journal that cannot
    be written, on a full disk, keeps no undo from running: an undo may be what frees the space.
    """
    clean = True
    if why is not None:
        where = began[-1].name if began else None
        await _attempt(f"noting why {saga.kind} failed", partial(journal.failed, where, why, timings or {}))
    for step in reversed(began):
        if step.undo is None:
            continue
        await _attempt(f"noting that {saga.kind} undoes {step.name!r}", partial(journal.note, step.name, "undoing"))
        clean &= await _attempt(f"{saga.kind}: undo of step {step.name!r}", partial(step.undo, context, facts))
        await _attempt(f"noting that {saga.kind} has undone {step.name!r}", partial(journal.note, step.name, "undone"))
    return clean and await _attempt(f"closing the page of {saga.kind}", journal.unwound)


def _bug(operation: str) -> NoidError:
    return NoidError(f"internal error; the server's log says more under {operation}")


async def _attempt(what: str, act: Callable[[], Awaitable[None]]) -> bool:
    """Do *act* whatever was cancelled, within `UNDO_SECS`, and return whether it worked; log it if not."""
    with trio.move_on_after(UNDO_SECS, shield=True):
        try:
            await act()
        except Exception:  # whatever it is, the other undos must still run
            logger.exception("%s failed; it is tried again, at the latest by the next start", what)
            return False
        return True
    logger.error("%s took longer than %g s; it is tried again, at the latest by the next start", what, UNDO_SECS)
    return False
