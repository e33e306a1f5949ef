"""TCP connections into guests, without any network: how many there are, how long making one takes, and their end.

A connection is a guest's end (`GuestConnection`) that somebody here holds. It belongs to the machine it was made in:
a VM that stops or is put back ends it, and a clone has none.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator

import trio

from noid.core.backends import Guest, GuestConnection
from noid.core.config.settings import LimitsConfig
from noid.core.model.connections import ConnectRequest
from noid.errors import DeadlineExceeded, TooManyRequests

CONNECT_SECS = 15.0
PER_VM_MAX = 256
"""A guest has room for 512 processes, which connections are: half of it stays for others."""


class Tunnels:
    """The connections that are held now. *limits* is asked each time, so that a limit can change."""

    def __init__(self, limits: Callable[[], LimitsConfig]) -> None:
        self._limits = limits
        self._by_user: Counter[str] = Counter()
        self._by_vm: Counter[str] = Counter()

    @property
    def open(self) -> int:
        """How many there are."""
        return self._by_user.total()

    @contextlib.contextmanager
    def place(self, owner: str, vm_id: str) -> Iterator[None]:
        """Hold a place for one connection of *owner* to the VM.

        Raises:
            TooManyRequests: all places are taken.
        """
        most = self._limits().max_tunnels_per_user
        if most is not None and self._by_user[owner] >= most:
            raise TooManyRequests(
                f"you have {most} connections to ports of VMs, and may not have more at a time. Close one first, or "
                "ask for a higher limits.max_tunnels_per_user.",
                retry_after_secs=1.0,
            )
        if self._by_vm[vm_id] >= PER_VM_MAX:
            raise TooManyRequests(
                f"the VM has {PER_VM_MAX} connections to its ports, which is the most. Close one first.",
                retry_after_secs=1.0,
            )
        self._by_user[owner] += 1
        self._by_vm[vm_id] += 1
        try:
            yield
        finally:
            _count_down(self._by_user, owner)
            _count_down(self._by_vm, vm_id)


async def connect(guest: Guest, request: ConnectRequest) -> GuestConnection:
    """Make the connection, in bounded time.

    Raises:
        DeadlineExceeded: nothing has answered.
        NoidError: see `Guest.connect`.
    """
    try:
        with trio.fail_after(CONNECT_SECS):
            return await guest.connect(request)
    except trio.TooSlowError as error:
        raise DeadlineExceeded(
            f"nothing answered at {request.target} of the guest within {CONNECT_SECS:g} s: a firewall in the guest or "
            "its network swallows what is sent there, or the guest is overloaded. Try again, or look with noid exec."
        ) from error


def _count_down(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
