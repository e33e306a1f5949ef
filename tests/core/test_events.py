"""Events: a reader has its own position, and one that is too slow is told so and costs nothing."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from noid.core import events
from noid.core.backends import Event
from noid.core.events import Events, Missed, Told
from noid.core.plugins import Plugins


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Events:
    monkeypatch.setattr(events, "KEPT_EVENTS", 3)
    return Events(Plugins())


def tell(told: Events, *names: str, owner: str = "me") -> None:
    for name in names:
        told.tell(Event(kind="vm.create", owner=owner, vm=name))


def rest(reader: events.EventReader) -> list[str]:
    """Return what *reader* has not seen yet."""
    names = []
    while (found := reader.next_now()) is not None:
        names.append(found.event.vm if isinstance(found, Told) else "GAP")
    return names


def test_a_reader_sees_what_happens_after_it_began_and_goes_on_where_it_was(told: Events) -> None:
    tell(told, "a")
    reader = told.reader("me")
    tell(told, "b", "c")
    tell(told, "theirs", owner="you")
    first = reader.next_now()
    assert isinstance(first, Told)
    assert first.event.vm == "b"
    assert rest(told.reader("me", first.position)) == rest(reader) == ["c"]


def test_a_reader_that_is_slower_than_what_happens_hears_of_a_gap(told: Events) -> None:
    reader = told.reader("me")
    tell(told, "a", "b", "c")
    assert rest(told.reader("me", reader.position)) == ["a", "b", "c"]
    tell(told, "d")
    assert rest(reader) == ["GAP", "b", "c", "d"]
    tell(told, *"efgh")
    missed = reader.next_now()
    assert isinstance(missed, Missed)
    assert rest(told.reader("me", missed.position)) == ["f", "g", "h"]


async def test_who_waits_is_woken(told: Events) -> None:
    reader, heard = told.reader("me"), []

    async def wait() -> None:
        heard.append(await reader.next())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        tell(told, "theirs", owner="you")
        tell(told, "mine")
    assert [each.event.vm for each in heard] == ["mine"]
