"""What admin commands ask of a running server: one route, for who comes through the unix socket alone."""

from __future__ import annotations

import dataclasses

from quart import Response

from noid.core.agent import Agent
from noid.core.model.users import Scope
from noid.core.people import departures
from noid.server.answers import json_reply
from noid.server.interim import still_working
from noid.server.schemas.failures import OPERATION
from noid.server.schemas.users import USER_REMOVED
from noid.server.table import Route


class UserRoutes:
    """``/v1/users/<user>``. Users are added by commands, which need no server."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def routes(self) -> list[Route]:
        """Return the lines of the table."""
        return [
            Route(
                method="DELETE", path="/v1/users/<user>", handler=self.remove, scope=Scope.ADMIN,
                answers={200: USER_REMOVED}, errors=OPERATION,
            )
        ]  # fmt: skip

    async def remove(self, user: str) -> Response:
        """Remove a user with all they have: tokens, VMs, checkpoints, files.

        Cut off or failed, it is to be repeated. Only through the unix socket, by whoever runs the server.
        """
        async with still_working():
            removed = await departures.remove_user(self._agent, user)
        return json_reply(dataclasses.asdict(removed))
