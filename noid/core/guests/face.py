"""Being in a guest: its agent, its processes, its console, and who commands run as."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator

import trio

from noid.core.backends import Guest, GuestConnection
from noid.core.guests import tunnels
from noid.core.guests.console import Console
from noid.core.guests.session import Session
from noid.core.guests.sessions import Sessions
from noid.core.guests.vmsessions import VmSessions
from noid.core.model.connections import ConnectRequest
from noid.core.model.names import checked_name
from noid.core.model.processes import ExecRequest
from noid.core.model.times import wire_time
from noid.core.model.users import User
from noid.core.model.vms import Vm
from noid.core.services import Services
from noid.core.vms import states
from noid.core.vms.sight import Sight
from noid.core.vms.supervisor import GuestLink
from noid.errors import Busy, DeadlineExceeded, NotFound

CONNECT_SECS = 10.0
RECOVERED_SECS = 2.0
CLOSE_SECS = 15.0


class Guests:
    """The guests of one host's VMs. Every method that takes a user sees that user's VMs only."""

    def __init__(self, services: Services, sessions: Sessions, sight: Sight) -> None:
        self._services = services
        self._store = services.store
        self._sessions = sessions
        self._sight = sight
        self.tunnels = tunnels.Tunnels(lambda: services.quotas.host)

    @contextlib.asynccontextmanager
    async def reach(self, user: User, name: str) -> AsyncIterator[Guest]:
        """Yield the VM's guest agent, over the one connection everybody shares.

        Raises:
            NotFound: there is no such VM.
            Conflict: it does not run.
            DependencyDown, DeadlineExceeded: its guest does not answer.
        """
        async with self._guest(name, self._link(await self._sight.handed_over(user, name))) as guest:
            yield guest

    def _link(self, vm: Vm, action: str = "exec") -> GuestLink:
        states.require(action, vm.name, vm.state)
        holder = self._sight.holder(vm)
        if holder is not None and self._services.supervisor.find(vm.id) is None:
            raise Busy(vm.name, holder)
        return self._services.supervisor.get(vm).link

    @contextlib.asynccontextmanager
    async def _guest(self, name: str, link: GuestLink) -> AsyncIterator[Guest]:
        await self._refuse_if_hung(name, link)
        guest = link.open_guest
        if guest is None:
            try:
                with trio.fail_after(CONNECT_SECS):
                    guest = await link.connected()
            except trio.TooSlowError as error:
                raise DeadlineExceeded(
                    f"the guest of VM {name!r} does not answer (waited {CONNECT_SECS:g} s). It may be busy or hung: "
                    f"try again, look at its serial.log, reboot it with `noid reboot {name}`, or restore it from a "
                    "checkpoint."
                ) from error
        async with link.using(guest):
            yield guest

    async def sessions(self, user: User, name: str) -> VmSessions:
        """Return the processes of the VM, also of one that has ended.

        Raises:
            NotFound: there is no such VM.
        """
        return await self._sessions.of(await self._sight.handed_over(user, name))

    async def start_process(self, user: User, name: str, request: ExecRequest, *, detached: bool) -> Session:
        """Start a process in the VM, as the image's default user unless the request names one.

        One that is not *detached* is the caller's to finish: see `VmSessions.finish`.

        Raises:
            NotFound: there is no such VM.
            Conflict: it does not run.
            InvalidRequest, Unsupported: the guest cannot start that.
            QuotaExceeded: as many run as may.
            DependencyDown, DeadlineExceeded: its guest does not answer.
        """
        vm = await self._sight.handed_over(user, name)
        link = self._link(vm)
        sessions = await self._sessions.of(vm)  # before anything that takes time: the same machine's as the link
        if request.user is None:
            request = dataclasses.replace(request, user=self._default_user(vm))
        async with self._guest(name, link) as guest:
            quotas = self._services.quotas
            if quotas.limits(user)["exec_sessions"] is not None:
                await self._sessions.known(vm.id for vm in self._store.vms(user.id))

            def admit() -> None:
                quotas.check_process(user, lambda: self._running_processes(user))

            return await sessions.start(guest, request, detached=detached, admit=admit)

    @contextlib.asynccontextmanager
    async def connection(self, user: User, name: str, request: ConnectRequest) -> AsyncIterator[GuestConnection]:
        """Yield a TCP connection made from inside the VM's guest; it is closed at the end, or reset if it is not over.

        It is made as the image's default user unless the request names one. It ends with the VM's machine.

        Raises:
            NotFound: there is no such VM.
            Conflict: it does not run.
            Unreachable: nothing takes connections there.
            Unsupported: this way into the guest, or this guest's agent, cannot.
            TooManyRequests: the user, or the VM, has as many as may be.
            DependencyDown, DeadlineExceeded: its guest does not answer.
        """
        vm = await self._sight.handed_over(user, name)
        link = self._link(vm, "connect")
        if request.user is None:
            request = dataclasses.replace(request, user=self._default_user(vm))
        with self.tunnels.place(user.id, vm.id):
            async with self._guest(name, link) as guest:
                connection = await tunnels.connect(guest, request)
                try:
                    yield connection
                finally:
                    with trio.move_on_after(CLOSE_SECS, shield=True):
                        await connection.aclose()

    async def quota(self, user: User) -> tuple[dict[str, int | None], dict[str, int]]:
        """Return the most *user* may have of each resource (None: no limit), and what they use."""
        quotas = self._services.quotas
        used = await quotas.use(user)
        return quotas.limits(user), {**used, "exec_sessions": self._running_processes(user)}

    def _running_processes(self, user: User) -> int:
        return self._sessions.running(vm.id for vm in self._store.vms(user.id))

    async def _refuse_if_hung(self, name: str, link: GuestLink) -> None:
        """Let pass unless the guest is known not to answer and has not come back since.

        Raises:
            DeadlineExceeded: says since when it does not answer.
        """
        since = link.health.unresponsive_since
        if since is None or await link.health.ask(link, RECOVERED_SECS):
            return
        raise DeadlineExceeded(
            f"the guest of VM {name!r} has not answered since {wire_time(since)} UTC. It may be hung or starved: look "
            f"at its serial.log, reboot it with `noid reboot {name}`, or restore it from a checkpoint."
        )

    def console(self, user: User, name: str) -> Console:
        """Return the serial console of the VM's machine, for as long as that runs.

        Raises:
            NotFound: there is no such VM.
            Conflict: it does not run.
        """
        vm = self._store.vm(user.id, checked_name(name))
        states.require("console", name, vm.state)
        return self._services.supervisor.get(vm).link.console

    def default_user(self, user: User, name: str) -> str:
        """Return who commands run as in that VM when nobody is named: the image's user, or root."""
        return self._default_user(self._store.vm(user.id, name))

    def _default_user(self, vm: Vm) -> str:
        try:
            return self._services.images.user(vm.image)
        except NotFound:
            return "root"
