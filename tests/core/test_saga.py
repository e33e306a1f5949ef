"""Sagas: what the journal says, what is undone and in which order, whatever ends them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from noid.core.database.store import Store, Tx, open_store
from noid.core.operations import saga
from noid.core.operations.saga import Facts, Saga, Step
from noid.errors import BackendError, Conflict, DeadlineExceeded, NoSpace


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path / "noid.db") as store:
        yield store


class Tale:
    """A saga of the steps a, b, c that writes down what happens, and goes wrong where it is told."""

    def __init__(self, store: Store, **breaks: object) -> None:
        self.store = store
        self.breaks = breaks
        self.events: list[str] = []
        steps = tuple(Step(name, self._do(name), None if name == "b" else self._undo(name)) for name in "abc")
        self.saga = Saga("tale", steps, lambda tale, _, tx: tale.commit(tx), deadline_secs=60.0)

    def _do(self, name: str):  # type: ignore[no-untyped-def]
        async def do(_: Tale, facts: Facts) -> Facts:
            self.events.append(f"do {name}")
            await self._break(name)
            return {name: f"fact of {name}"}

        return do

    def _undo(self, name: str):  # type: ignore[no-untyped-def]
        async def undo(_: Tale, facts: Facts) -> None:
            self.events.append(f"undo {name}")
            await self._break(f"undo_{name}")

        return undo

    async def _break(self, where: str) -> None:
        what = self.breaks.get(where)
        if isinstance(what, BaseException):
            raise what
        if what == "hang":
            await trio.sleep_forever()
        if what == "hang in a nursery":  # a cancellation comes out of it as a group of cancellations
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                await trio.sleep_forever()

    def commit(self, tx: Tx) -> None:
        tx.insert_user("committed", "id-of-committed")
        if isinstance(error := self.breaks.get("commit"), BaseException):
            raise error

    async def run(self) -> dict[str, float]:
        return await saga.run(self.saga, self, self.store, owner="me", vm_name="web", facts={})

    def page(self) -> tuple[str | None, list[str]]:
        """The outcome and the journal of the one operation there is."""
        rows = self.store._read("SELECT * FROM operations")
        events = self.store._read("SELECT step, event FROM journal ORDER BY seq")
        assert len(rows) == 1
        return rows[0]["outcome"], [f"{row['event']} {row['step']}" for row in events]

    @property
    def committed(self) -> bool:
        return [user.name for user in self.store.users()] == ["committed"]


async def test_the_journal_has_all_steps_when_it_opens_and_finished_with_the_commit(store: Store) -> None:
    tale = Tale(store)
    timings = await tale.run()
    assert tale.page() == ("finished", ["planned a", "planned b", "planned c"])
    assert tale.committed
    assert list(timings) == ["a", "b", "c"]


async def test_the_journal_has_every_step_before_the_first_begins(store: Store) -> None:
    tale = Tale(store, a="hang")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tale.run)
        while tale.events != ["do a"]:
            await trio.testing.wait_all_tasks_blocked(0.005)
        assert store.open_operations()[0]["events"] == [("a", "planned"), ("b", "planned"), ("c", "planned")]
        nursery.cancel_scope.cancel()


async def test_a_saga_whose_steps_have_nothing_to_tell_is_two_transactions(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    tale = Tale(store)

    async def silent(_: Tale, __: Facts) -> None:
        await trio.lowlevel.checkpoint()

    tale.saga = dataclasses.replace(tale.saga, steps=tuple(Step(name, silent) for name in "abc"))
    writes = []
    write = Store.write

    async def counted(self: Store, *args: Any, **kwargs: Any) -> Any:
        writes.append(args)
        return await write(self, *args, **kwargs)

    monkeypatch.setattr(Store, "write", counted)
    await tale.run()
    assert len(writes) == 2


async def test_what_began_is_undone_last_first_and_the_error_is_raised(store: Store) -> None:
    tale = Tale(store, c=BackendError("c broke"))
    with pytest.raises(BackendError, match="c broke"):
        await tale.run()
    assert tale.events == ["do a", "do b", "do c", "undo c", "undo a"]
    outcome, journal = tale.page()
    assert outcome == "unwound"
    assert journal[3:] == ["failed c", "undoing c", "undone c", "undoing a", "undone a"]
    assert not tale.committed


async def test_an_undo_that_fails_keeps_no_other_from_running_and_leaves_the_page_open(store: Store) -> None:
    tale = Tale(store, c=BackendError("c broke"), undo_c=OSError("disk on fire"))
    with pytest.raises(BackendError, match="c broke"):
        await tale.run()
    assert tale.events[-2:] == ["undo c", "undo a"]
    assert tale.page()[0] is None


async def test_an_undo_that_hangs_is_given_up_and_leaves_the_page_open(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saga, "UNDO_SECS", 0.05)
    tale = Tale(store, c=BackendError("c broke"), undo_c="hang")
    with pytest.raises(BackendError, match="c broke"):
        await tale.run()
    assert tale.events[-2:] == ["undo c", "undo a"]
    assert tale.page()[0] is None


@pytest.mark.parametrize("how", ["hang", "hang in a nursery"])
async def test_a_cancelled_saga_is_undone_before_the_cancellation_goes_on(store: Store, how: str) -> None:
    tale = Tale(store, b=how)
    with trio.move_on_after(0.1) as scope:
        await tale.run()
    assert scope.cancelled_caught
    assert tale.events == ["do a", "do b", "undo a"]
    assert tale.page()[0] == "interrupted"


async def test_a_saga_that_only_goes_forward_is_left_to_the_next_start_when_the_agent_ends(store: Store) -> None:
    tale = Tale(store, b="hang")
    tale.saga = Saga("tale", tale.saga.steps, tale.saga.commit, deadline_secs=60.0, forward=True)
    with trio.move_on_after(0.1) as scope:
        await tale.run()
    assert scope.cancelled_caught
    assert tale.events == ["do a", "do b"]
    (page,) = store.open_operations()
    tale.breaks.clear()
    await saga.run(
        tale.saga, tale, store, owner="me", vm_name="web", facts={}, page=saga.Journal(store, page["id"], {})
    )
    assert tale.page()[0] == "finished"
    assert tale.committed


async def test_a_deadline_names_the_operation_the_vm_and_the_step(store: Store) -> None:
    tale = Tale(store, b="hang in a nursery")
    tale.saga = Saga("tale", tale.saga.steps, tale.saga.commit, deadline_secs=0.1)
    with pytest.raises(DeadlineExceeded, match=r"tale of 'web' took longer than 0\.1 s in step 'b'"):
        await tale.run()
    assert tale.events[-1] == "undo a"
    assert tale.page()[0] == "unwound"


async def test_a_commit_that_fails_commits_nothing_and_all_is_undone(store: Store) -> None:
    tale = Tale(store, commit=Conflict("somebody was faster"))
    with pytest.raises(Conflict, match="somebody was faster"):
        await tale.run()
    assert not tale.committed
    assert tale.events[-2:] == ["undo c", "undo a"]
    assert tale.page()[0] == "unwound"


async def test_a_journal_on_a_full_disk_keeps_no_undo_from_running(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The undo may be what frees the space."""
    tale = Tale(store, c=NoSpace("the disk is full"))
    note = Tx.note

    def full_after_c(tx: Tx, operation: str, step: str, event: str) -> None:
        if event != "planned":
            raise NoSpace("the disk is full")
        note(tx, operation, step, event)

    monkeypatch.setattr(Tx, "note", full_after_c)
    with pytest.raises(NoSpace):
        await tale.run()
    assert tale.events[-2:] == ["undo c", "undo a"]
    assert not tale.committed


async def test_the_end_of_the_process_undoes_nothing_and_leaves_the_page_to_the_next(store: Store) -> None:
    tale = Tale(store, b=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        await tale.run()
    assert tale.events == ["do a", "do b"]
    assert [operation["kind"] for operation in store.open_operations()] == ["tale"]


async def test_facts_of_finished_steps_are_in_the_journal_for_the_next_process(store: Store) -> None:
    tale = Tale(store, c=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        await tale.run()
    assert store.open_operations()[0]["facts"] == '{"a": "fact of a", "b": "fact of b"}'
