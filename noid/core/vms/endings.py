"""What happens when a machine ends by itself: its VM's row says so, and a guest that has reset is started again.

A guest that reboots ends its machine, because a machine continued from a checkpoint has no kernel to boot from. So the
VM is started anew on its disk, as an operation like any other. A guest that does nothing but reset is given up.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable

import trio

from noid.core.backends import Event, MachineExit
from noid.core.database.store import Store, Tx
from noid.core.events import Events
from noid.core.model.vms import Vm, VmState
from noid.core.operations.running import Operations
from noid.errors import Busy, Conflict, NoidError

logger = logging.getLogger(__name__)

RESETS_MAX = 5
RESETS_WITHIN_SECS = 60.0
#: Operations that end machines themselves and write down what became of them.
_ENDING = frozenset({"stop", "reboot", "start"})


class Endings:
    """Hears of ended machines. What has reset comes back once `serve` was called."""

    def __init__(self, store: Store, operations: Operations, events: Events, nursery: trio.Nursery) -> None:
        self._store = store
        self._operations = operations
        self._events = events
        self._nursery = nursery
        self._resets: dict[str, deque[float]] = {}
        self._reboot: Callable[[Vm], Awaitable[object]] | None = None
        self._serving = trio.Event()

    def serve(self, reboot: Callable[[Vm], Awaitable[object]]) -> None:
        """Let *reboot* bring back VMs whose machine has gone: also those that were to wait for it."""
        self._reboot = reboot
        self._serving.set()

    async def note(self, vm_id: str, instance: str, why: MachineExit) -> None:
        """Act on the end of the VM's machine *instance*, unless the VM has another by now."""
        vm = self._find(vm_id, instance)
        if vm is None or self._operations.holder(vm.owner, vm.name) in _ENDING:
            return
        if why.reason == "reset":
            if self._may_come_back(vm_id):
                self._nursery.start_soon(self._come_back, vm_id, instance, name=f"reboot {instance}")
                return
            within = f"{RESETS_MAX} times within {RESETS_WITHIN_SECS:g} s"
            await self._write(vm_id, instance, VmState.DEAD, f"the guest has reset more than {within}")
            return
        state = VmState.STOPPED if why.reason == "shutdown" else VmState.DEAD
        ended = "the guest has powered off" if state is VmState.STOPPED else f"{why.reason}: {why.detail}".rstrip(": ")
        await self._write(vm_id, instance, state, ended)

    def _may_come_back(self, vm_id: str) -> bool:
        resets = self._resets.setdefault(vm_id, deque(maxlen=RESETS_MAX + 1))
        resets.append(trio.current_time())
        return len(resets) <= RESETS_MAX or resets[-1] - resets[0] > RESETS_WITHIN_SECS

    async def _come_back(self, vm_id: str, instance: str) -> None:
        """Start the VM again once nothing else is done with it, unless that has changed what there is to start."""
        await self._serving.wait()
        while (vm := self._find(vm_id, instance)) is not None and self._reboot is not None:
            await self._operations.free(vm.owner, vm.name)
            vm = self._find(vm_id, instance)
            if vm is None:
                return
            try:
                logger.info("the guest of VM %s has reset; booting it again", vm.name, extra={"vm": vm.name})
                await self._reboot(vm)
            except Busy:
                continue
            except NoidError as error:  # its row says what it is now
                logger.warning("VM %s has reset and does not come back: %s", vm.name, error, extra={"vm": vm.name})
            except Exception:  # a bug here must not end the agent
                logger.exception("VM %s has reset and does not come back", vm.name, extra={"vm": vm.name})
            return

    def _find(self, vm_id: str, instance: str) -> Vm | None:
        """Return the VM if that machine is still the one it is said to run on."""
        alive = (VmState.RUNNING, VmState.PAUSED)
        vms = (vm for vm in self._store.all_vms() if vm.id == vm_id)
        return next((vm for vm in vms if vm.instance == instance and vm.state in alive), None)

    async def _write(self, vm_id: str, instance: str, state: VmState, ended: str) -> None:
        def change(tx: Tx) -> Vm | None:
            vm = tx.current(vm_id)
            if vm.instance != instance or vm.state not in (VmState.RUNNING, VmState.PAUSED):
                return None
            tx.update_vm(vm, state=state, process=None, ended=ended)
            return vm

        with contextlib.suppress(Conflict):  # destroyed at the same time
            vm = await self._store.write(change)
            if vm is not None:
                logger.warning("VM %s is %s: %s", vm.name, state, ended, extra={"vm": vm.name})
                facts = {"state": state.value, "ended": ended, "generation": vm.generation + 1}
                kind = "vm.died" if state is VmState.DEAD else "vm.ended"
                self._events.tell(Event(kind=kind, owner=vm.owner, vm=vm.name, facts=facts))
