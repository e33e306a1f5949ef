"""Idempotency keys: a call that is repeated with the same key gets the same answer, and what it does is done once.

An operation's key is written by the transaction that opens its page in the journal. So whatever crashes when, there is
either both or none, and a key's answer is what the journal says of its operation: the result, or the error; an
operation that was undone because its agent ended is as if it had never been asked for. A call that is no operation
writes its key before it begins and its answer when it has ended. In between nobody can know, and a repetition is told
that: such calls happen at most once.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

import trio

from noid.core.database.store import Store, Tx
from noid.core.model.times import now
from noid.core.model.users import User
from noid.core.operations.outcomes import Operation
from noid.core.operations.performing import KEPT, Performer
from noid.errors import Conflict, InvalidRequest, KeyReused, NoidError, NotFound, TooManyRequests

logger = logging.getLogger(__name__)

KEY_LENGTH_MAX = 255
#: How many keys a user can use in `KEPT`, and how long an answer can be that is repeated.
KEYS_MAX = 10_000
ANSWER_BYTES_MAX = 16 * 1024
FORGET_SECS = 3600.0
WRITE_SECS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer a call got. *body* None: it was not kept, because it is a secret or too long."""

    status: int
    body: bytes | None


class Held:
    """A key while its call runs: nobody else does the same meanwhile. Leave it with `Keys.release`."""

    def __init__(self, owner: str, key: str, request: str) -> None:
        self.owner = owner
        self.key = key
        self.request = request
        self.settled = trio.Event()
        """Set once the database knows what a repetition has to know, or the call is over."""

    def written_with(self, tx: Tx, operation: str | None) -> None:
        """Write the key, with the *operation* it stands for.

        Raises:
            TooManyRequests: its owner has used too many.
        """
        (count,) = tx.execute(_COUNT_OTHERS, self.owner, self.key).fetchone()
        if count >= KEYS_MAX:
            raise TooManyRequests(
                f"more than {KEYS_MAX} idempotency keys were used within {KEPT}. Use fewer, or none where a call may "
                "simply be repeated."
            )
        tx.execute(_WRITE, self.owner, self.key, self.request, operation, now().isoformat())


_COUNT_OTHERS = "SELECT count(*) FROM idempotency WHERE owner = ? AND key != ?"
_WRITE = "INSERT OR REPLACE INTO idempotency (owner, key, request, operation, at) VALUES (?, ?, ?, ?, ?)"
_ANSWER = "UPDATE idempotency SET status = ?, body = ? WHERE owner = ? AND key = ?"
_FORGET = "DELETE FROM idempotency WHERE owner = ? AND key = ?"
_FIND = "SELECT request, operation, status, body FROM idempotency WHERE owner = ? AND key = ? AND at > ?"
_FORGET_OLD = "DELETE FROM idempotency WHERE at <= ?"


class Keys:
    """The keys of one data directory's users. A key is its user's; two users may use the same."""

    def __init__(self, store: Store, operations: Performer) -> None:
        self._store = store
        self._operations = operations
        self._held: dict[tuple[str, str], Held] = {}

    async def take(self, user: User, key: str, request: str) -> Held | Operation | Answer:
        """Return what a call with that key came to, or `Held`: then it is the caller's to make.

        Waits while somebody else holds the key. An `Operation` may still run. *request* says what the call is, so that
        a key is not used for two.

        Raises:
            KeyReused: it was used for another request.
            Conflict: nobody knows what the call has come to, or its answer was not kept.
        """
        while (held := self._held.get((user.id, key))) is not None:
            if held.request != request:
                raise KeyReused
            await held.settled.wait()
        rows = self._store.rows(_FIND, user.id, key, (now() - KEPT).isoformat())
        if not rows:
            return self._hold(user, key, request)
        known, operation, status, body = rows[0]
        if known != request:
            raise KeyReused
        if operation is not None:
            return self._operation(user, operation) or self._hold(user, key, request)
        if status is None:
            raise Conflict(
                "a call with this Idempotency-Key was begun, and nobody knows whether it was carried out: its client "
                "or the agent was gone before it ended. Look at what there is, then use another key."
            )
        return Answer(status=status, body=body)

    def release(self, held: Held) -> None:
        """Let others see what is known of the key. A second time does nothing."""
        if self._held.get((held.owner, held.key)) is held:
            del self._held[held.owner, held.key]
        held.settled.set()

    async def begin(self, held: Held) -> None:
        """Write down that a call begins which is no operation.

        Raises:
            TooManyRequests: its user has used too many keys.
            NoSpace: there is no room for what it will be answered.
        """
        await self._store.write(lambda tx: held.written_with(tx, None), needs_room=True)

    async def answered(self, held: Held, answer: Answer) -> None:
        """Keep what the call was answered. What cannot be kept is logged: the call itself has happened."""
        fits = answer.body is not None and len(answer.body) <= ANSWER_BYTES_MAX
        body = answer.body if fits else None

        def change(tx: Tx) -> None:
            held.written_with(tx, None)
            tx.execute(_ANSWER, answer.status, body, held.owner, held.key)

        await self._write(change)

    async def forget(self, held: Held) -> None:
        """Make the key as if it had never been used: the call was refused before it did anything."""
        await self._write(lambda tx: tx.execute(_FORGET, held.owner, held.key))

    async def keep_forgetting(self) -> None:
        """Remove keys older than `KEPT`, once in a while. Runs until it is cancelled."""
        while True:
            await self._write(lambda tx: tx.execute(_FORGET_OLD, (now() - KEPT).isoformat()))
            await trio.sleep(FORGET_SECS)

    def _hold(self, user: User, key: str, request: str) -> Held:
        held = self._held[user.id, key] = Held(user.id, key, request)
        return held

    def _operation(self, user: User, operation: str) -> Operation | None:
        try:
            found = self._operations.get(user, operation)
        except NotFound:
            return None
        return None if found.interrupted else found

    async def _write(self, change: Callable[[Tx], object]) -> None:
        with trio.move_on_after(WRITE_SECS, shield=True):
            try:
                await self._store.write(change)
            except NoidError as error:
                logger.warning("cannot write down what is known of an idempotency key: %s", error)


def checked_key(key: str) -> str:
    """Return *key* if it is one: 1 to 255 visible ASCII characters.

    Raises:
        InvalidRequest: it is not.
    """
    if not 1 <= len(key) <= KEY_LENGTH_MAX or not all("!" <= character <= "~" for character in key):
        raise InvalidRequest(f"Idempotency-Key must be 1 to {KEY_LENGTH_MAX} visible ASCII characters without spaces.")
    return key


def fingerprint(*parts: bytes) -> str:
    """Return what tells a request, given as its *parts*, from another one."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()
