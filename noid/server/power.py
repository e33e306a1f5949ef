"""The routes that stop, start, reboot, pause and resume a VM. Each returns when that is done, with its steps' times."""

from __future__ import annotations

from quart import Response

from noid.core.agent import Agent
from noid.core.model.names import checked_name
from noid.core.model.users import Scope
from noid.core.vms import power
from noid.errors import InvalidRequest
from noid.server.interim import still_working
from noid.server.rest import Body, outcome_reply, read_body
from noid.server.schemas.vms import STOP, VM_CHANGED
from noid.server.schemas.vocabulary import optional_json
from noid.server.table import Route
from noid.server.visit import current_user


class PowerRoutes:
    """``/v1/vms/<name>/stop``, ``/start``, ``/reboot``, ``/pause``, ``/resume``: 200 with the VM as it is then.

    Bodies may be missing.
    """

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def routes(self) -> list[Route]:
        """Return the lines of the table."""
        stop = optional_json(STOP)
        verbs = {
            "stop": (self.stop, stop),
            "start": (self.start, None),
            "reboot": (self.reboot, stop),
            "pause": (self.pause, None),
            "resume": (self.resume, None),
        }
        return [
            Route(
                method="POST", path=f"/v1/vms/<name>/{verb}", handler=handler, scope=Scope.MANAGE, operation=True,
                body=body, answers={200: VM_CHANGED},
            )
            for verb, (handler, body) in verbs.items()
        ]  # fmt: skip

    async def stop(self, name: str) -> Response:
        """Let the guest shut down; ``how`` in the answer says whether it did, or had to be killed."""
        checked_name(name)
        grace_secs = _grace_secs(await read_body(may_be_empty=True))
        async with still_working():
            outcome = await self._agent.power.stop(current_user(), name, grace_secs)
        return outcome_reply(outcome)

    async def start(self, name: str) -> Response:
        """Boot a stopped or dead VM on its disk."""
        checked_name(name)
        async with still_working():
            outcome = await self._agent.power.start(current_user(), name)
        return outcome_reply(outcome)

    async def reboot(self, name: str) -> Response:
        """Let the guest shut down and boot it again."""
        checked_name(name)
        grace_secs = _grace_secs(await read_body(may_be_empty=True))
        async with still_working():
            outcome = await self._agent.power.reboot(current_user(), name, grace_secs)
        return outcome_reply(outcome)

    async def pause(self, name: str) -> Response:
        """Stop the VM's CPUs; everything else of it stays."""
        checked_name(name)
        async with still_working():
            outcome = await self._agent.power.pause(current_user(), name)
        return outcome_reply(outcome)

    async def resume(self, name: str) -> Response:
        """Let the CPUs of a paused VM go on."""
        checked_name(name)
        async with still_working():
            outcome = await self._agent.power.resume(current_user(), name)
        return outcome_reply(outcome)


def _grace_secs(body: Body) -> float:
    """Return how long the guest has to shut down; 0: it is not asked.

    Raises:
        InvalidRequest: out of range, or no number.
    """
    grace_secs = body.number("timeout_secs", power.GRACE_SECS)
    if not 0 <= grace_secs <= power.GRACE_SECS_MAX:
        raise InvalidRequest(f"timeout_secs is {grace_secs:g}; it must be between 0 and {power.GRACE_SECS_MAX:g}.")
    return 0.0 if body.flag("force") else grace_secs
