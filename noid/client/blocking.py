"""The client for programs that wait: every call takes the thread it was made on until the answer is there."""

from __future__ import annotations

from noid.client.calls.call import AnswerT, Call
from noid.client.link import Link
from noid.client.settings import Endpoint
from noid.client.waiting import Blocking, finished


class Client:
    """Talks to the agent at *endpoint*, a connection for each call."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._link = Link(endpoint, Blocking())

    def perform(self, call: Call[AnswerT]) -> AnswerT:
        """Make *call* and return its answer; as `Link.perform`."""
        return finished(self._link.perform(call))
