"""The audit log: who changed what, who was not let in. Rows are only ever added: the database itself refuses the rest.

What succeeds, or fails for reasons of the server's, is a row of its own, written before the answer is sent. What is
refused is easy to repeat a thousand times a second, so of equal refusals within `WINDOW_SECS` the first is written at
once, and the others as one row that counts them. No row has a token, a value of an environment, input or output.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import trio

from noid.core.database.store import Store, Tx
from noid.core.model.times import now
from noid.core.model.users import Caller
from noid.core.redaction import hidden
from noid.errors import NoidError, NoSpace

logger = logging.getLogger(__name__)

WINDOW_SECS = 60.0
REFUSALS_MAX = 1000
#: How many rows wait in memory, at most, for room on a full disk.
DEFERRED_MAX = 10_000
TEXT_MAX = 200
WRITE_SECS = 10.0

AUTHENTICATE = "authenticate"
"""The action of somebody who was not let in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One line of the log.

    *user*, *user_id* and *token* (a name) say who, where that is known; *address* from where: ``local`` is this host.
    *request* is the id in the server's log. *action* is a route or a command, *target* what it was done to. *status*
    is the HTTP status, 0 for a command that was carried out, None if nobody waited for the answer. *count* is how many
    equal ones, the last of them at *at*, this row stands for.
    """

    at: datetime
    user: str | None = None
    user_id: str | None = None
    token: str | None = None
    address: str = "local"
    request: str | None = None
    action: str
    target: str = ""
    status: int | None = None
    count: int = 1
    seq: int = 0

    @classmethod
    def of(
        cls, caller: Caller | None, action: str, target: str, status: int | None, *, address: str, request: str
    ) -> AuditEntry:
        """Return the entry of something *caller* has asked for, now."""
        return cls(
            at=now(),
            user=None if caller is None else caller.user.name,
            user_id=None if caller is None else caller.user.id,
            token=None if caller is None else caller.token,
            address=address[:TEXT_MAX],
            request=request,
            action=action,
            target=hidden(target)[:TEXT_MAX],
            status=status,
        )

    @property
    def is_refusal(self) -> bool:
        """Whether it was the caller's fault."""
        return self.status is not None and 400 <= self.status < 500


class AuditLog:
    """Writes the log of one data directory."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._counted: dict[tuple[object, ...], AuditEntry] = {}
        self._deferred: list[AuditEntry] = []

    async def record(self, entry: AuditEntry) -> None:
        """Write *entry*, or count it if it is one of many refusals. Cancelled or not, it is written.

        On a full disk it is kept, and written once there is room: the log grows without bound, and must not take what
        is reserved for undoing and destroying. What cannot be written is in the server's log.
        """
        if entry.is_refusal and not self._is_first(entry):
            return
        await self._write([entry])

    async def keep_flushing(self) -> None:
        """Write down, once in a while, how many equal refusals there were. Runs until it is cancelled."""
        while True:
            await trio.sleep(WINDOW_SECS)
            await self.flush()

    async def flush(self) -> None:
        """Write down how many equal refusals there were since the last time."""
        counted, self._counted = self._counted, {}
        await self._write([entry for entry in counted.values() if entry.count > 0])

    async def close(self) -> None:
        """Write down all there is, room or not: nobody else knows of it."""
        counted, self._counted = self._counted, {}
        await self._write([entry for entry in counted.values() if entry.count > 0], needs_room=False)

    def _is_first(self, entry: AuditEntry) -> bool:
        """Return whether nothing like *entry* is being counted; from then on it is."""
        key: tuple[object, ...] = (entry.user_id, entry.token, entry.address, entry.action, entry.target, entry.status)
        if key not in self._counted and len(self._counted) >= REFUSALS_MAX:
            # From so many places, or about so many things, that rows of their own would fill the disk.
            key = (entry.status,)
            entry = dataclasses.replace(entry, user=None, user_id=None, token=None, address="(many)", target="")
        counted = self._counted.get(key)
        self._counted[key] = dataclasses.replace(entry, count=0 if counted is None else counted.count + 1)
        return counted is None

    async def _write(self, entries: Sequence[AuditEntry], *, needs_room: bool = True) -> None:
        entries, self._deferred = [*self._deferred, *entries], []
        if not entries:
            return
        with trio.move_on_after(WRITE_SECS, shield=True) as scope:
            try:
                await self._store.write(lambda tx: insert(tx, entries), needs_room=needs_room)
            except NoidError as error:
                if needs_room and isinstance(error, NoSpace):
                    self._defer(entries)
                    return
                lost = "the audit log lacks %d rows, the last about %s: %s"
                logger.error(lost, len(entries), entries[-1], error)  # noqa: TRY400  # it says it all
        if scope.cancelled_caught:
            logger.error("the audit log lacks %d rows, the last about %s: no time", len(entries), entries[-1])

    def _defer(self, entries: Sequence[AuditEntry]) -> None:
        """Keep *entries* until there is room; of too many, the newest are lost."""
        kept = [*self._deferred, *entries]
        if not self._deferred:
            logger.warning("the disk is full: rows of the audit log wait in memory for room, the first is %s", kept[0])
        for entry in kept[DEFERRED_MAX:]:
            logger.error("the audit log lacks a row, because the disk is full: %s", entry)
        self._deferred = kept[:DEFERRED_MAX]


def insert(tx: Tx, entries: Sequence[AuditEntry]) -> None:
    """Add *entries* to the log."""
    for entry in entries:
        row = (
            entry.at.isoformat(timespec="microseconds"), entry.user, entry.user_id, entry.token, entry.address,
            entry.request, entry.action, entry.target, entry.status, entry.count,
        )  # fmt: skip
        tx.execute(f"INSERT INTO audit ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", *row)  # noqa: S608  # own names


def entries(
    store: Store, *, after: int = 0, user: str | None = None, since: datetime | None = None, last: int | None = None
) -> list[AuditEntry]:
    """Return what is in the log behind row *after*, oldest first: of *user*, from *since* on, at most the *last*."""
    # An instant has one text: times are written in UTC, with microseconds.
    begin = "" if since is None else since.isoformat(timespec="microseconds")
    rows = store.rows(
        f"SELECT seq, {_COLUMNS} FROM audit WHERE seq > ? AND at >= ? AND (? IS NULL OR user = ?) "  # noqa: S608  # own names
        "ORDER BY seq DESC LIMIT ?",
        after, begin, user, user, -1 if last is None else last,
    )  # fmt: skip
    return [AuditEntry(**{**dict(row), "at": datetime.fromisoformat(row["at"])}) for row in reversed(rows)]


def last_seq(store: Store) -> int:
    """Return the number of the newest row, 0 if there is none."""
    return int(store.rows("SELECT coalesce(max(seq), 0) FROM audit")[0][0])


_COLUMNS = "at, user, user_id, token, address, request, action, target, status, count"
