"""Removing a user: nobody comes in, nothing new is made, everything of theirs ends, and then they are forgotten.

Cut off anywhere, it can be repeated: each part finds done what is done, and the user's row goes last.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import trio

from noid import hostfs
from noid.core.agent import Agent
from noid.core.database.store import Tx
from noid.core.model.users import User
from noid.errors import Busy, InvalidRequest, NotFound

logger = logging.getLogger(__name__)

SETTLE_SECS = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """What went with a user."""

    vms: int
    checkpoints: int
    bytes: int


async def remove_user(agent: Agent, name: str) -> Removed:
    """Remove a user: their tokens, VMs, checkpoints, files and row. What they did stays in the audit log.

    Raises:
        NotFound: no such user.
        InvalidRequest: it is the local user, who is whoever runs the agent.
        Busy: an operation on one of their VMs does not end. They cannot come in any more; the rest is to be repeated.
        BackendError: something on the disk cannot be removed; likewise.
    """
    user = agent.users.named(name)
    if user.id == agent.local_user().id:
        raise InvalidRequest(f"user {name!r} is whoever runs this agent and cannot be removed.")
    services = agent.services
    await agent.users.revoke_tokens(user)
    await services.quotas.set_limits(user, {"vms": 0, "checkpoints": 0}, frozenset())  # for what is under way
    occupied = (await services.quotas.use(user))["bytes"]
    vms = await _destroy_all(agent, user)
    checkpoints = len(services.store.checkpoints(user.id))
    await agent.forget_copies(user)
    with hostfs.os_errors(f"removing the files of user {name!r}"):
        await trio.to_thread.run_sync(hostfs.remove_tree, services.layout.users / user.id)
    await services.store.write(lambda tx: _forget(tx, user))
    services.events.forget(user.id)
    logger.info("user %s is removed: %d VMs, %d checkpoints, %d bytes", name, vms, checkpoints, occupied)
    return Removed(vms=vms, checkpoints=checkpoints, bytes=occupied)


async def _destroy_all(agent: Agent, user: User) -> int:
    """Destroy *user*'s VMs as soon as nothing else holds them, and return how many there were."""
    destroyed = 0
    with trio.move_on_after(SETTLE_SECS):
        while vms := agent.vms(user):
            for vm in vms:
                try:
                    await agent.settled(user, vm.name)
                    await agent.destroy_vm(user, vm.name)
                    destroyed += 1
                except NotFound:  # what made it has been undone
                    continue
                except Busy as error:  # somebody was faster
                    logger.info("removing user %s waits: %s", user.name, error)
        return destroyed
    if not (left := agent.vms(user)):
        return destroyed
    raise Busy(left[0].name, left[0].busy or "another operation")


def _forget(tx: Tx, user: User) -> None:
    tx.execute("DELETE FROM checkpoints WHERE owner = ?", user.id)
    tx.execute("DELETE FROM users WHERE id = ?", user.id)
