"""The machines that run now: for each a watcher, one shared guest connection, and what is known of its health."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import trio

from noid.core.backends import ExecBackend, Guest, Machine, MachineExit
from noid.core.guests.console import CONSOLE_LOG, Console
from noid.core.guests.filewatch import FileWatches
from noid.core.model.vms import Vm
from noid.core.vms.health import Health
from noid.core.waiting import plain_nursery
from noid.errors import BackendError, ConfigError, DependencyDown, NoidError

logger = logging.getLogger(__name__)

CLOSE_SECS = 5.0
PING_SECS = 2.0
#: How long one of several ways into a guest is tried before the next one is.
TRY_SECS = 15.0


class GuestLink:
    """A machine's one connection to its guest agent, opened when first needed and shared by everybody.

    A connection that fails is dropped, and whoever comes next opens a new one. *console* is the same machine's.

    Of several *backends* each is tried in turn, again and again, until one reaches the guest; that one stays.
    """

    def __init__(
        self, machine: Machine, console: Console, backends: Sequence[ExecBackend], nursery: trio.Nursery
    ) -> None:
        self.console = console
        self._machine = machine
        self._backends = list(backends)
        self._nursery = nursery
        self.health = Health(f"of process {machine.ref.pid}")
        self._opening = trio.Lock()
        self._guest: Guest | None = None
        self._scope: trio.CancelScope | None = None

    @contextlib.asynccontextmanager
    async def guest(self) -> AsyncIterator[Guest]:
        """Yield the guest, connected. Bound entering with ``fail_after``: it waits until the agent answers."""
        guest = await self.connected()
        async with self.using(guest):
            yield guest

    @property
    def open_guest(self) -> Guest | None:
        """The guest, if the connection is open."""
        return self._guest

    @contextlib.asynccontextmanager
    async def using(self, guest: Guest) -> AsyncIterator[None]:
        """Use *guest*, which is `connected`, in the block. If that fails, look whether its connection is to be kept."""
        try:
            yield
        except (DependencyDown, BackendError):
            if self._guest is guest and not await self._answers(guest):
                self.drop()
            raise

    @property
    def heard_at(self) -> float | None:
        """When the guest said something last on the connection that is open, on trio's clock. None: none is open."""
        return None if self._guest is None else self._guest.heard_at

    @property
    def is_seen(self) -> bool:
        """Whether a question would be typed on the guest's console: it has no agent, or it is not known yet."""
        return not all(backend.needs_agent for backend in self._backends)

    def drop(self) -> None:
        """Close the connection, also one that is being opened. The next `guest` opens a new one."""
        if self._scope is not None:
            self._scope.cancel()
        self._guest = self._scope = None

    async def connected(self) -> Guest:
        """Return the guest, for `using`, waiting until its agent answers: bound it."""
        if self._guest is not None:
            return self._guest
        async with self._opening:
            if self._guest is not None:
                return self._guest
            guest: Guest = await self._nursery.start(self._hold)
            return guest

    async def _hold(self, task_status: trio.TaskStatus[Guest]) -> None:
        """Keep the connection open until `drop`. Errors before it is open are the opener's; later ones are logged."""
        opened = False
        scope = self._scope = trio.CancelScope()

        async def hold(backend: ExecBackend, attempt: trio.CancelScope) -> None:
            nonlocal opened
            async with backend.connect(self._machine, self.console) as guest:
                attempt.deadline = math.inf
                self._backends = [backend]
                opened, self._guest = True, guest
                self.health.heard()
                task_status.started(guest)
                await trio.sleep_forever()

        try:
            with scope:
                await self._try_in_turn(hold)
        except Exception as error:
            if not opened:
                raise
            logger.info("guest connection ended: %s", error)  # an error must not cross the agent's nursery
        finally:
            if self._scope is scope:
                self._guest = self._scope = None
        if not opened:
            raise DependencyDown("the connection to the guest was given up while it was made: its machine has ended.")

    async def _try_in_turn(self, hold: Callable[[ExecBackend, trio.CancelScope], Awaitable[None]]) -> None:
        """Give each backend a while, until one of them never returns from *hold*. One that fails is not tried again.

        Raises:
            NoidError: the last one left failed.
        """
        left = self._backends
        while True:
            for backend in list(left):
                with trio.CancelScope() as attempt:
                    if len(left) > 1:
                        attempt.deadline = trio.current_time() + TRY_SECS
                    try:
                        await hold(backend, attempt)
                    except NoidError as error:
                        if self._guest is not None or len(left) == 1:
                            raise
                        logger.info("exec backend %s does not reach the guest: %s", backend.name, error)
                        left = [other for other in left if other is not backend]

    @property
    def reached_by(self) -> str:
        """The name of the backend that reaches the guest; empty until one has."""
        return self._backends[0].name if len(self._backends) == 1 else ""

    async def _answers(self, guest: Guest) -> bool:
        """Return whether the connection itself still works: the failure of one user must not disturb the others."""
        with trio.move_on_after(PING_SECS, shield=True):
            try:
                await guest.ping()
            except (DependencyDown, BackendError):
                return False
            return True
        return False


@dataclass(slots=True, kw_only=True)
class Live:
    """A VM's machine while this agent holds it. *gone* is set when it has ended by itself, and *why* says how."""

    vm_id: str
    instance: str
    machine: Machine
    link: GuestLink
    watch: trio.CancelScope = field(default_factory=trio.CancelScope)
    gone: trio.Event = field(default_factory=trio.Event)
    why: MachineExit | None = None


class Observer(Protocol):
    """Who wants to know what becomes of machines. None of this may block or fail."""

    def held(self, live: Live) -> None:
        """A machine has become a VM's."""
        ...

    def released(self, vm_id: str, replaced: bool) -> None:
        """Whatever machine the VM had is about to be ended, perhaps *replaced*."""
        ...

    def ended(self, live: Live, why: MachineExit) -> None:
        """A machine has ended by itself."""
        ...


class Supervisor:
    """Holds the live machines by VM id and tells when one ends by itself."""

    def __init__(
        self,
        nursery: trio.Nursery,
        execs: Sequence[ExecBackend],
        on_exit: Callable[[str, str, MachineExit], Awaitable[None]],
        observer: Observer | None = None,
    ) -> None:
        self._nursery = nursery
        self._execs = execs
        self._on_exit = on_exit
        self._observer = observer
        self._live: dict[str, Live] = {}
        self._held = trio.Event()
        self.watches = FileWatches(nursery)

    def link(self, machine: Machine, directory: Path, reached_by: str = "", *, has_agent: bool = True) -> GuestLink:
        """Return a connection for a machine that is not held yet. *directory* is its plan's.

        *reached_by* names the exec backend that has reached this guest before; no other is tried then.

        Raises:
            ConfigError: none of the selected exec backends can reach it.
        """
        usable = [backend for backend in self._execs if has_agent or not backend.needs_agent]
        usable = [backend for backend in usable if backend.name == reached_by] or usable
        if not usable:
            raise ConfigError(
                "the image has no agent in its guest, and no selected exec backend can do without. Add one to "
                '[backends] exec in server.toml (exec = ["vsock", "serial"]).'
            )
        console = Console(machine, directory / CONSOLE_LOG, self.watches)
        return GuestLink(machine, console, usable, self._nursery)

    def get(self, vm: Vm) -> Live:
        """Return *vm*'s machine.

        Raises:
            DependencyDown: it has none that runs.
        """
        live = self._live.get(vm.id)
        if live is None or live.instance != vm.instance:
            raise DependencyDown(
                f"VM {vm.name!r} has no running machine. Boot its disk with `noid start`, restore it from a "
                "checkpoint, or destroy it."
            )
        return live

    def find(self, vm_id: str) -> Live | None:
        """Return the machine held for the VM, or None."""
        return self._live.get(vm_id)

    def hold(self, vm_id: str, instance: str, machine: Machine, link: GuestLink) -> Live | None:
        """Take over *machine* as the VM's, and return the one it replaces, which is no longer watched."""
        old = self.release(vm_id, replaced=True)
        live = Live(vm_id=vm_id, instance=instance, machine=machine, link=link)
        self._live[vm_id] = live
        self._nursery.start_soon(self._watch, live, name=f"watch {instance}")
        self._held.set()
        self._held = trio.Event()
        if self._observer is not None:
            self._observer.held(live)
        return old

    async def next_hold(self) -> None:
        """Return when `hold` has been called again."""
        await self._held.wait()

    def release(self, vm_id: str, *, replaced: bool = False) -> Live | None:
        """Stop watching the VM's machine and return it, or None."""
        if self._observer is not None:
            self._observer.released(vm_id, replaced)
        live = self._live.pop(vm_id, None)
        if live is not None:
            live.watch.cancel()
            live.link.drop()
            live.link.console.end()
        return live

    async def _watch(self, live: Live) -> None:
        """Wait for the machine's end. Whoever releases it closes it; otherwise it is closed here."""
        try:
            with live.watch:
                why = live.why = await self._end_of(live)
                if self._observer is not None:
                    self._observer.ended(live, why)
                live.link.drop()
                live.link.console.end()
                if self._live.get(live.vm_id) is live:
                    del self._live[live.vm_id]
                    await self._on_exit(live.vm_id, live.instance, why)
        except Exception:  # one machine must not end the agent: errors stay in this task
            logger.exception("machine %s: its end cannot be written down; the next start does", live.instance)
        finally:
            if not live.watch.cancel_called:
                with trio.move_on_after(CLOSE_SECS, shield=True):
                    await live.machine.aclose()
            if live.why is not None:
                live.gone.set()

    async def _end_of(self, live: Live) -> MachineExit:
        """Return how the machine ended; until then its guest's health is looked after."""
        ended: list[MachineExit] = []
        async with plain_nursery() as nursery:
            nursery.start_soon(live.link.health.watch, live.link)
            ended.append(await live.machine.wait())
            nursery.cancel_scope.cancel()
        return ended[0]
