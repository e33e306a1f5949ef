"""The caller, to the agent."""

from __future__ import annotations

from noid.client.answers import Identity, Quota, ServerVersion
from noid.client.calls.call import Call, one


def whoami() -> Call[Identity]:
    """Ask who the caller is to the agent."""
    return Call(method="GET", path="/v1/whoami", understand=one(Identity))


def quota() -> Call[Quota]:
    """Ask what the caller may have of each resource, and has."""
    return Call(method="GET", path="/v1/quota", understand=one(Quota))


def version() -> Call[ServerVersion]:
    """Ask which version the agent is. Answered without a token."""
    return Call(method="GET", path="/version", understand=one(ServerVersion))
