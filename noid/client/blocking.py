"""The client for programs that wait: every call takes the thread it was made on until the answer is there."""

from __future__ import annotations

from noid.client import transport
from noid.client.calls.call import AnswerT, Call, NotNoid, refusal
from noid.client.errors import ConnectionFailed
from noid.client.settings import Endpoint


class Client:
    """Talks to the agent at *endpoint*, a connection for each call."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    def perform(self, call: Call[AnswerT]) -> AnswerT:
        """Make *call* and return its answer.

        Raises:
            ServerError: the agent refused or failed.
            ConnectionFailed: there is no agent, or it went away; what was asked for may or may not have happened.
        """
        reply = transport.request(self.endpoint, call)
        if not 200 <= reply.status < 300:
            raise refusal(self.endpoint.address, reply)
        try:
            return call.understand(reply)
        except NotNoid as error:
            raise ConnectionFailed(
                f"{self.endpoint.address} answered something noid-server would not. Is the URL right, or a login page "
                "in between?"
            ) from error
