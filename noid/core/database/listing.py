"""Which part of a list somebody wants: what the things in it must be, where to go on, and how many at most."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from noid.core.model.vms import VmState

Position = tuple[str, str]
"""Where a thing is in a list that is sorted by age: when it was made, in a text that sorts like the time, and its id.

What is made or removed meanwhile moves nothing else, so whoever goes on from a position meets everything once."""


class Dated(Protocol):
    """What such lists are of."""

    @property
    def id(self) -> str:
        """Unique in the list."""
        ...

    @property
    def created_at(self) -> datetime:
        """Aware."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A part of a list.

    *labels* must all be there; with a value, they must have it. *states*, if there are any, are those of VMs. *vm_name*
    is whose checkpoints. The list goes on *after* a position, and ends after *limit* things.
    """

    labels: tuple[tuple[str, str | None], ...] = ()
    states: frozenset[VmState] = frozenset()
    vm_name: str | None = None
    after: Position | None = None
    limit: int | None = None


ALL = Wanted()


def position_of(thing: Dated) -> Position:
    """Return where *thing* is."""
    return thing.created_at.astimezone(UTC).isoformat(timespec="microseconds"), thing.id
