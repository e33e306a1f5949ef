"""Operations: changes under way and done, looked at and cancelled."""

from __future__ import annotations

from noid.client.answers import OperationInfo
from noid.client.calls.call import Call, listed, many, one, with_query


def every(*, vm: str | None = None, state: str | None = None, limit: int | None = None) -> Call[list[OperationInfo]]:
    """Ask for the caller's operations of the last 24 hours, newest first; for all of them, or *limit*, 1000 at most."""
    if limit is None:
        return listed(with_query("/v1/operations", vm=vm, state=state), OperationInfo)
    path = with_query("/v1/operations", vm=vm, state=state, limit=limit)
    return Call(method="GET", path=path, understand=many(OperationInfo))


def get(operation: str) -> Call[OperationInfo]:
    """Ask for one operation, as it is now."""
    return Call(method="GET", path=f"/v1/operations/{operation}", understand=one(OperationInfo))


def ended(operation: str, *, at_most_secs: float) -> Call[OperationInfo]:
    """Ask for one operation when it has ended, or after *at_most_secs* (300 at most) as it is then."""
    path = with_query(f"/v1/operations/{operation}", wait=f"{at_most_secs:g}")
    return Call(method="GET", path=path, quick=False, understand=one(OperationInfo))


def cancel(operation: str) -> Call[OperationInfo]:
    """Have what an operation has begun undone; 409 if it has ended, or can only go forward."""
    return Call(method="POST", path=f"/v1/operations/{operation}/cancel", understand=one(OperationInfo))
