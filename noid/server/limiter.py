"""How often somebody may try: failed authentications by address and token, requests by user, in bounded memory."""

from __future__ import annotations

from collections import OrderedDict

import trio

from noid.errors import TooManyRequests

FAILURES_PER_TOKEN = 10
FAILURES_PER_ADDRESS = 100
FAILURE_WINDOW_SECS = 60.0
FAILURE_KEYS_MAX = 10_000
REQUEST_KEYS_MAX = 10_000

_TOKEN_PREFIX = slice(0, 25)  # "noid_tok_" and 16 digits: tells tokens apart without holding one


class FailureLimiter:
    """Counts failed authentications per address and token, and per address, within a window; bounded in memory.

    A token that failed `FAILURES_PER_TOKEN` times from one address is not even looked up. An address that failed
    `FAILURES_PER_ADDRESS` times with whatever tokens hears 429 for further failures; a valid token still passes,
    because behind one address there may be many users. (Guessing is hopeless either way: a token has 256 bits.)
    Addresses are places: see `noid.core.people.networks.place`.
    """

    def __init__(self) -> None:
        self._failures: OrderedDict[tuple[str, str], tuple[float, int]] = OrderedDict()

    def check(self, address: str, token: str) -> None:
        """Raise if *token* failed too often from *address*.

        Raises:
            TooManyRequests: it did.
        """
        if self._count(address, token[_TOKEN_PREFIX]) >= FAILURES_PER_TOKEN:
            raise _too_many_failures()

    def failed(self, address: str, token: str) -> None:
        """Remember that *token* failed from *address*.

        Raises:
            TooManyRequests: *address* has failed too often.
        """
        exceeded = self._count(address, "") >= FAILURES_PER_ADDRESS
        for key in ((address, token[_TOKEN_PREFIX]), (address, "")):
            began, count = self._failures.pop(key, (trio.current_time(), 0))
            if trio.current_time() - began > FAILURE_WINDOW_SECS:
                began, count = trio.current_time(), 0
            self._failures[key] = (began, count + 1)
        while len(self._failures) > FAILURE_KEYS_MAX:
            self._failures.popitem(last=False)
        if exceeded:
            raise _too_many_failures()

    def _count(self, address: str, prefix: str) -> int:
        began, count = self._failures.get((address, prefix), (0.0, 0))
        return count if trio.current_time() - began <= FAILURE_WINDOW_SECS else 0


def _too_many_failures() -> TooManyRequests:
    return TooManyRequests("too many authentication failures, try again later", FAILURE_WINDOW_SECS)


class RequestLimiter:
    """Lets so many requests a second of each user pass, with whatever tokens, and some more at once after a pause.

    Not by token: who may make tokens would make one more for every burst.
    """

    def __init__(self) -> None:
        #: By user: how many requests may come at once, and at which time that was so.
        self._users: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def pass_one(self, user_id: str, *, per_second: float, burst: int) -> None:
        """Count a request of a user. *per_second* 0 lets everything pass.

        Raises:
            TooManyRequests: it has to wait; it is not counted.
        """
        if not per_second:
            return
        now = trio.current_time()
        left, at = self._users.pop(user_id, (float(burst), now))
        left = min(float(burst), left + (now - at) * per_second)
        self._users[user_id] = (left - 1 if left >= 1 else left, now)
        while len(self._users) > REQUEST_KEYS_MAX:
            self._users.popitem(last=False)
        if left < 1:
            raise TooManyRequests(
                f"you make more than {per_second:g} requests a second, all your tokens together. Make fewer, or ask "
                "whoever runs the server for a higher requests_per_second.",
                (1 - left) / per_second,
            )
