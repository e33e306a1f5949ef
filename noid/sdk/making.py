"""Making what shall not be left behind when nobody waits for it any more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from noid.client.calls.call import AnswerT, Call, NotNoid, Reply, raw, with_query
from noid.client.errors import ConnectionFailed, ServerError
from noid.client.link import Link, keyed
from noid.errors import Conflict

UNDO_SECS = 60.0
_CANCEL_WAIT_SECS = 30


async def made(link: Link, call: Call[AnswerT], unmake: Callable[[AnswerT], Call[None]]) -> AnswerT:
    """Return the answer of *call*, which makes something; if this is cut off, *unmake* it, whatever became of it.

    A server goes on making what nobody waits for. It is asked again with the same key, so it can only mean the same
    thing, and nothing of that name that somebody else has made.
    """
    call = keyed(call)
    try:
        return await link.perform(call)
    except ServerError:
        raise  # refused or failed: there is nothing
    except BaseException:
        with link.waiting.shielded(UNDO_SECS):
            try:
                there = await _what_became_of(link, call)  # noqa: ASYNC102  # shielded and bounded above
                if there is not None:
                    await link.perform(unmake(there))  # noqa: ASYNC102  # shielded and bounded above
            except ConnectionFailed:
                pass  # no more can be done without a server; why this was cut off is the error
        raise


async def _what_became_of(link: Link, call: Call[AnswerT]) -> AnswerT | None:
    """Return what *call* has made, or None, having cancelled it if it is under way."""
    reply = await link.reply(replace(call, headers={**call.headers, "Prefer": "respond-async"}))
    if reply.status != 202:
        return _understood(link, call, reply) if 200 <= reply.status < 300 else None
    try:
        place = f"/v1/operations/{reply.json()['id']}"
    except (ValueError, TypeError, KeyError) as error:
        raise link.nonsense() from error
    try:
        await link.perform(raw("POST", f"{place}/cancel"))
    except ServerError as error:
        if error.status != Conflict.status:  # it has ended meanwhile
            raise
    ended = await link.perform(raw("GET", with_query(place, wait=_CANCEL_WAIT_SECS)))
    match ended:
        case {"state": "succeeded"}:
            return _understood(link, call, await link.reply(call))
    return None


def _understood(link: Link, call: Call[AnswerT], reply: Reply) -> AnswerT:
    try:
        return call.understand(reply)
    except NotNoid as error:
        raise link.nonsense() from error
