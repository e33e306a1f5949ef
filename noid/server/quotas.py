"""What the caller may have, and has: one route, to look at."""

from __future__ import annotations

from quart import Response

from noid.core.agent import Agent
from noid.server.answers import json_reply
from noid.server.schemas.quotas import QUOTA
from noid.server.table import Route
from noid.server.visit import current_user


class QuotaRoutes:
    """``/v1/quota``. Who changes it is at the server: ``noid-server quota``."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def routes(self) -> list[Route]:
        """Return the lines of the table."""
        return [
            Route(method="GET", path="/v1/quota", handler=self.quota, answers={200: QUOTA}, errors=frozenset({507}))
        ]

    async def quota(self) -> Response:
        """Show the caller's limits, null where there is none, and what they use."""
        limits, use = await self._agent.guests.quota(current_user())
        return json_reply({"limits": limits, "use": use})
