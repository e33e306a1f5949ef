"""The caller, to the agent."""

from __future__ import annotations

from noid.client.answers import Identity
from noid.client.calls.call import Call, one


def whoami() -> Call[Identity]:
    """Ask who the caller is to the agent."""
    return Call(method="GET", path="/v1/whoami", understand=one(Identity))
