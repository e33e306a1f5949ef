"""The client: one server or this user's own agent, and everything that can be asked of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from noid.client.link import Link

if TYPE_CHECKING:
    from noid.client.answers import Identity
    from noid.client.calls.call import AnswerT, Call
    from noid.client.settings import Endpoint
    from noid.sdk.checkpoint import Checkpoint
    from noid.sdk.events import Events
    from noid.sdk.temporary import Temporary
    from noid.sdk.vm import Vm

CPUS = 1
MEM_MIB = 2048


class Client:
    """Talks to a server, or to this user's own agent, which is started when it does not run.

    ::

        async with noid.Client() as client:
            vm = await client.create("web")
            print((await vm.run(["uname", "-a"])).text)

    Without arguments it is the one that the ``noid`` command would take: ``NOID_URL`` and ``NOID_TOKEN``, the config
    file, else the local agent. Each call has a connection of its own, so tasks may share a client; a cancelled call
    hangs up. A call that changes something is safe to lose: it is sent again once, and done once.

    Every method raises `ServerError` when the server refuses or fails, and `ConnectionFailed` when there is no talking
    to it.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        token: str | None = None,
        socket: str | os.PathLike[str] | None = None,
        link: Link | None = None,
    ) -> None:
        """Choose the server at *url*, or of that name, with *token* or the one known for it; or the agent at *socket*.

        *link* is a way to talk to one already, in place of all that.

        Raises:
            InvalidRequest: that is no URL, or no token. ConfigError: the config file is broken.
        """
        self._link = link or _trio_link(endpoint_of(url, token, socket))

    @classmethod
    def local(cls) -> Self:
        """Return a client of this user's own agent, whatever the configuration says."""
        from noid.client.settings import choose_endpoint

        return cls(link=_trio_link(choose_endpoint(local=True)))

    async def __aenter__(self) -> Self:
        """Return this. What is entered in here is better left before it."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Do nothing: no connection outlives its call."""

    @property
    def endpoint(self) -> Endpoint:
        """The agent it talks to."""
        return self._link.endpoint

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.endpoint.address}>"

    # --- any call ---------------------------------------------------------------------------------------------------

    async def perform(self, call: Call[AnswerT]) -> AnswerT:
        """Make a call of `noid.client.calls`, and return its answer as it came."""
        return await self._link.perform(call)

    async def request(self, method: str, path: str, body: object = None) -> Any:
        """Ask anything of the HTTP interface, and return the decoded answer, None where there is none."""
        from noid.client.calls.call import raw

        return await self._link.perform(raw(method, path, body))

    async def whoami(self) -> Identity:
        """Return who the caller is to the server."""
        from noid.client.calls import account

        return await self._link.perform(account.whoami())

    # --- VMs --------------------------------------------------------------------------------------------------------

    async def create(
        self,
        name: str,
        *,
        cpus: int = CPUS,
        mem_mib: int = MEM_MIB,
        image: str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Vm:
        """Create a VM, and return it when its guest answers. The first of a shape may take a minute, others do not.

        Refused with 409 if there is one of that name, 400 if it cannot be made that way. Nothing was made then.
        """
        from noid.client.calls import vms
        from noid.sdk.vm import Vm

        call = vms.create(name, cpus=cpus, mem_mib=mem_mib, image=image, labels=labels)
        return Vm(self._link, await self._link.perform(call))

    def temporary(
        self,
        *,
        name: str | None = None,
        cpus: int = CPUS,
        mem_mib: int = MEM_MIB,
        image: str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Temporary:
        """Return what makes a VM when it is entered, and destroys it when it is left: a name is made up if none is.

        However the block ends, also by a cancellation in the middle of making it, nothing is left.
        """
        from noid.client.calls import vms
        from noid.sdk.temporary import Temporary

        chosen = name or f"temporary-{os.urandom(6).hex()}"
        return Temporary(self._link, vms.create(chosen, cpus=cpus, mem_mib=mem_mib, image=image, labels=labels))

    async def vms(self, *, labels: Sequence[str] = ()) -> list[Vm]:
        """Return the caller's VMs, oldest first; those that have all *labels*, ``KEY`` or ``KEY=VALUE``."""
        from noid.client.calls import vms
        from noid.sdk.vm import Vm

        return [Vm(self._link, info) for info in await self._link.perform(vms.every(labels))]

    async def vm(self, name: str) -> Vm:
        """Return the VM *name*; refused with 404 if there is none."""
        from noid.client.calls import vms
        from noid.sdk.vm import Vm

        return Vm(self._link, await self._link.perform(vms.get(name)))

    async def checkpoints(self, *, vm: str | None = None, labels: Sequence[str] = ()) -> list[Checkpoint]:
        """Return the caller's checkpoints, oldest first, also of VMs that are gone; of *vm*, with all *labels*."""
        from noid.client.calls import checkpoints
        from noid.sdk.checkpoint import Checkpoint

        found = await self._link.perform(checkpoints.every(vm=vm, labels=labels))
        return [Checkpoint(self._link, info) for info in found]

    def events(
        self, *, vm: str | None = None, kinds: Sequence[str] = (), after: str | None = None, follow: bool = True
    ) -> Events:
        """Return what happens from when it is entered, or behind the event *after*: to *vm*, of *kinds*, or all.

        With *follow* it does not end; else behind what has happened.
        """
        from noid.sdk.events import Events

        return Events(self._link, vm, tuple(kinds), after, follow=follow)


def endpoint_of(url: str | None, token: str | None, socket: str | os.PathLike[str] | None) -> Endpoint:
    """Return the agent that the arguments of a client mean.

    Raises:
        InvalidRequest, ConfigError: as for `Client`.
        TypeError: both a URL and a socket.
    """
    from noid.client.servers import checked_token, normalised_url
    from noid.client.settings import Endpoint, choose_endpoint

    if token is not None:
        token = checked_token(token)
    if socket is not None:
        if url is not None:
            raise TypeError("either a url or a socket says which agent is meant, not both.")
        return Endpoint(socket_path=os.fsdecode(socket), token=token)
    if token is None:
        return choose_endpoint(server=url)
    if url is None:
        raise TypeError("a token belongs to a server: give its url too.")
    return Endpoint(url=normalised_url(url), token=token)


def _trio_link(endpoint: Endpoint) -> Link:
    from noid.client.trio_waiting import TrioWaiting

    return Link(endpoint, TrioWaiting())
