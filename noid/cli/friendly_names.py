"""Names for VMs whose owners gave them none: two plain words, as one can say them aloud and type them.

Each is a VM name and a host name (RFC 1123). The server knows nothing of this: a name that is taken is refused, and
another one is tried, see `unused`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from noid.client.errors import ServerError
from noid.errors import Busy

TRIES = 8
_CONFLICT = 409

_ADJECTIVES = """
    amber ample apt bold brave brief bright brisk broad calm candid clear clever cosy crisp daring deep deft eager
    early easy even fair fast fine firm fleet fond free fresh gentle glad golden grand green handy happy hardy honest
    humble idle jolly keen kind large late lean light lively loyal lucky mellow merry mild modest neat nimble noble
    patient plain polite prime proud quick quiet rapid ready rosy round royal rustic safe sharp shiny silent silver
    simple sleek small smart smooth snug solid spare steady still stout subtle sunny sure swift tall tame tidy tiny
    trusty upbeat vast vivid warm wild wise witty young
"""
_NOUNS = """
    acorn alder anchor apple arrow ash badger basin bay beacon beech birch bison bluff boulder bridge brook canyon
    castle cedar cliff cloud clover comet coral cove crane creek cricket delta dune eagle elm ember falcon fern field
    finch fjord forest fountain fox garden glacier glen grove gull harbour hare harvest hawk hazel heath heron hill
    hollow island ivy jay kestrel lagoon lake lantern lark laurel lily linden lynx maple marsh meadow mesa mill moon
    moor moss oak oasis orchard otter owl peak pebble pine plum pond poplar prairie puffin quarry rain raven reef ridge
    river robin rowan sage shore sky sparrow spring spruce star stone stream summit swan teal thicket tide trail tulip
    valley violet walnut wave willow wind wren
"""

MadeT = TypeVar("MadeT")


def invented(number: int | None = None) -> str:
    """Return a name, at most 32 characters long, with *number* at its end if there is one."""
    drawn = int.from_bytes(os.urandom(8), "big")  # `random` would take longer to import than this takes to run
    adjectives, nouns = _ADJECTIVES.split(), _NOUNS.split()
    adjective, noun = adjectives[drawn % len(adjectives)], nouns[drawn // len(adjectives) % len(nouns)]
    return f"{adjective}-{noun}" if number is None else f"{adjective}-{noun}-{number}"


def unused(make: Callable[[str], MadeT]) -> MadeT:
    """Return what *make* returns for an invented name; with another one after the server has said that it is taken.

    Raises:
        ServerError: anything else was wrong, or `TRIES` names were taken.
    """
    for attempt in range(TRIES):
        try:
            return make(invented(None if attempt == 0 else int.from_bytes(os.urandom(2), "big") % 9000 + 1000))
        except ServerError as error:
            if attempt == TRIES - 1 or not (is_taken(error) or error.code == Busy.code):
                raise
    raise AssertionError  # the last attempt returned or raised


def is_taken(error: ServerError) -> bool:
    """Return whether the server refused a name because there is a VM of that name; by its words, as ever since 0.1."""
    return error.status == _CONFLICT and "already exists" in str(error)
