"""Networks that need no privileges: ``user`` (the guest reaches out through QEMU's slirp) and ``none`` (no card)."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import trio

from noid.core.backends import AgentContext, BackendSpec, NetworkBackend
from noid.core.model.vms import NetLease
from noid.hookspecs import hookimpl

# slirp's own defaults, which QEMU's documentation promises: each VM has this network to itself, so that every guest
# has the same address and two of them never meet.
GUEST_ADDRESS = "10.0.2.15/24"
GATEWAY = "10.0.2.2"


@dataclass(frozen=True, slots=True, kw_only=True)
class NetUserConfig:
    """``[plugins.net_user]`` and ``[plugins.net_none]``: nothing to set."""


class UserNetwork:
    """Fulfils `noid.core.backends.NetworkBackend`: a network per VM inside its VMM process. Keeps no state."""

    name = "user"
    kinds = frozenset({"user"})

    async def lease(self, instance: str) -> NetLease:
        """Return the lease of *instance*: the same for all, because each is alone on a network of its own.

        The hardware address stays the VMM's default for the same reason, so a clone has nothing to change.
        """
        await trio.lowlevel.checkpoint()
        return NetLease(kind="user", guest_address=GUEST_ADDRESS, gateway=GATEWAY)

    async def release(self, instance: str) -> None:
        """Do nothing: the network ends with the VMM process."""
        await trio.lowlevel.checkpoint()


class NoNetwork:
    """Fulfils `noid.core.backends.NetworkBackend` for VMs without a network card."""

    name = "none"
    kinds = frozenset({"none"})

    async def lease(self, instance: str) -> None:
        """Return no lease: there is no card to connect."""
        await trio.lowlevel.checkpoint()

    async def release(self, instance: str) -> None:
        """Do nothing."""
        await trio.lowlevel.checkpoint()


@contextlib.asynccontextmanager
async def open_user(config: NetUserConfig, context: AgentContext) -> AsyncIterator[NetworkBackend]:
    """Open ``user``. Whether this QEMU was built with slirp is the VMM's to say, in ``features.network_kinds``."""
    await trio.lowlevel.checkpoint()
    yield UserNetwork()


@contextlib.asynccontextmanager
async def open_none(config: NetUserConfig, context: AgentContext) -> AsyncIterator[NetworkBackend]:
    """Open ``none``."""
    await trio.lowlevel.checkpoint()
    yield NoNetwork()


@hookimpl
def network_backend() -> list[BackendSpec[NetworkBackend]]:
    """Offer ``user`` and ``none``; the core takes a list for one offer."""
    return [
        BackendSpec(name="user", config=NetUserConfig, open=open_user),
        BackendSpec(name="none", config=NetUserConfig, open=open_none),
    ]
