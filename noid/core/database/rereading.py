"""Reading a SQLite database without reading again what nobody has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

RECORDS_KEPT = 4096


class Connection(Protocol):
    """What of a connection to SQLite is used here."""

    def execute(self, sql: str, parameters: tuple[object, ...] = (), /) -> Any:
        """Run a query and return its rows."""
        ...


class Rereader:
    """Answers queries on *connection*, which only reads. What it keeps is of the commit that the database is at.

    SQLite's ``data_version`` is another number once anybody, in any process, has committed anything; asking for it
    takes a microsecond. Then everything kept is forgotten, so no answer is older than the moment it is asked for.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._version = -1
        self._kept: dict[tuple[Any, str, tuple[object, ...]], tuple[Any, ...]] = {}
        self._room = RECORDS_KEPT

    def records(self, make: Callable[[Any], T], sql: str, arguments: tuple[object, ...]) -> tuple[T, ...]:
        """Return what *make* makes of each row of a query. Both depend on nothing but the database and *arguments*."""
        (version,) = self._connection.execute("PRAGMA data_version").fetchone()
        if version != self._version:
            self._version, self._kept, self._room = version, {}, RECORDS_KEPT
        key = (make, sql, arguments)
        found = self._kept.get(key)
        if found is None:
            found = tuple(map(make, self._connection.execute(sql, arguments)))
            if (size := len(found) + 1) <= self._room:
                self._kept[key] = found
                self._room -= size
        return found
