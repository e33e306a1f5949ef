"""VMs as their owners see them: the stored row, what holds it now, and what is known of its guest's health."""

from __future__ import annotations

import dataclasses
import functools
from datetime import datetime

import trio

from noid.core.database.listing import ALL, Wanted
from noid.core.database.rows import VMS_REMEMBERED
from noid.core.database.store import Store
from noid.core.model.names import checked_name
from noid.core.model.users import User
from noid.core.model.vms import Vm
from noid.core.operations.running import Operations
from noid.core.vms.supervisor import GuestLink, Supervisor

HANDOVER_SECS = 2.0


class Sight:
    """Looks at VMs. Every method that takes a user sees that user's VMs only."""

    def __init__(self, store: Store, supervisor: Supervisor, operations: Operations) -> None:
        self._store = store
        self._supervisor = supervisor
        self._operations = operations

    def all(self, user: User, wanted: Wanted = ALL) -> list[Vm]:
        """Return those of *user*'s VMs that are *wanted*, oldest first."""
        return [self._seen(vm) for vm in self._store.vms(user.id, wanted)]

    def one(self, user: User, name: str) -> Vm:
        """Return *user*'s VM.

        Raises:
            NotFound: there is none of that name, or it is not theirs.
        """
        return self._seen(self._store.vm(user.id, checked_name(name)))

    def holder(self, vm: Vm) -> str | None:
        """Return the operation that holds *vm* now, or None."""
        return self._operations.holder(vm.owner, vm.name)

    async def handed_over(self, user: User, name: str) -> Vm:
        """Return the VM's row. A commit is seen an instant before its machine is held; this waits for that.

        Raises:
            NotFound: there is no such VM.
        """
        vm = self._store.vm(user.id, checked_name(name))
        with trio.move_on_after(HANDOVER_SECS):
            while self._is_handed_over(vm):
                await self._supervisor.next_hold()
                vm = self._store.vm(user.id, name)
        return vm

    def _is_handed_over(self, vm: Vm) -> bool:
        live = self._supervisor.find(vm.id)
        held = live is not None and live.instance == vm.instance
        return not held and self.holder(vm) is not None

    def _seen(self, vm: Vm) -> Vm:
        live = self._supervisor.find(vm.id)
        link = live.link if live is not None and live.instance == vm.instance else None
        return seen_by(vm, link, self.holder(vm))


def seen_by(vm: Vm, link: GuestLink | None, busy: str | None = None) -> Vm:
    """Return *vm*, as it is stored, with what holds it and what is known of its guest's health; None: nothing."""
    if link is None:
        return _seen(vm, busy, None, None)
    return _seen(vm, busy, link.health.responding, link.health.unresponsive_since)


@functools.lru_cache(maxsize=VMS_REMEMBERED)
def _seen(vm: Vm, busy: str | None, responding: bool | None, unresponsive_since: datetime | None) -> Vm:
    return dataclasses.replace(vm, busy=busy, responding=responding, unresponsive_since=unresponsive_since)
