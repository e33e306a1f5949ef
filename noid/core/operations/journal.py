"""What the journal tells of operations, as whoever looks at them is told: rows made into `Operation`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from noid.core.database.store import Store
from noid.core.operations.outcomes import Operation, OperationState, Outcome, Recorded
from noid.core.operations.records import from_json
from noid.errors import DependencyDown, NoidError, NotFound, OperationCancelled

#: Not the facts, which are recovery's.
_FIELDS = """id, kind, owner, vm_name, outcome, error, code, status, started_at, ended_at, timings, result,
    (SELECT step FROM journal WHERE operation = operations.id AND event = 'failed' ORDER BY seq DESC LIMIT 1) AS step"""
_STATES = {
    None: "TRUE",
    OperationState.RUNNING: "outcome IS NULL AND code IS NULL",
    OperationState.SUCCEEDED: "outcome = 'finished'",
    OperationState.CANCELLED: f"code = '{OperationCancelled.code}'",
    OperationState.FAILED: f"(code <> '{OperationCancelled.code}' OR outcome = 'interrupted')",
}
_INTERRUPTED = (
    "it was interrupted because the noid agent ended. What it had begun is undone, at the latest by the next start. "
    "Ask for it again."
)


def find(store: Store, owner: str, operation: str) -> Operation:
    """Return *owner*'s operation, as if it did not run in this agent.

    Raises:
        NotFound: there is none of that id, or it is not theirs.
    """
    rows = store.rows(f"SELECT {_FIELDS} FROM operations WHERE owner = ? AND id = ?", owner, operation)  # noqa: S608  # own text
    if not rows:
        raise NotFound(f"operation {operation!r} not found")
    return _operation(dict(rows[0]))


def find_all(
    store: Store,
    owner: str,
    *,
    since: datetime,
    vm: str | None = None,
    state: OperationState | None = None,
    before: str | None = None,
    limit: int = -1,
) -> list[Operation]:
    """Return *owner*'s operations that began after *since*, newest first.

    Those of the VM named *vm*; those in *state*; those older than the operation *before*; at most *limit*.
    """
    wanted: list[tuple[str, object]] = [("owner = ?", owner), ("started_at > ?", since.isoformat())]
    wanted += [("vm_name = ?", vm)] if vm is not None else []
    wanted += [("id < ?", before)] if before is not None else []
    where = " AND ".join([*(condition for condition, _ in wanted), _STATES[state]])
    sql = f"SELECT {_FIELDS} FROM operations WHERE {where} ORDER BY id DESC LIMIT ?"  # noqa: S608  # own text
    return [_operation(dict(row)) for row in store.rows(sql, *(value for _, value in wanted), limit)]


def _operation(row: Mapping[str, Any]) -> Operation:
    finished, code = row["outcome"] == "finished", row["code"]
    interrupted = not finished and code is None
    error: NoidError | None = None
    if not finished:
        error = DependencyDown(_INTERRUPTED) if code is None else Recorded(row["error"], code, row["status"])
    state = OperationState.SUCCEEDED if finished else OperationState.FAILED
    if code == OperationCancelled.code:
        state = OperationState.CANCELLED
    outcome = from_json(Outcome, json.loads(row["result"])) if row["result"] else None
    return Operation(
        id=row["id"],
        kind=row["kind"],
        owner=row["owner"],
        vm=row["vm_name"],
        state=state,
        step=None if finished else row["step"],
        started_at=datetime.fromisoformat(row["started_at"]),
        ended_at=None if row["ended_at"] is None else datetime.fromisoformat(row["ended_at"]),
        timings=json.loads(row["timings"] or "{}") if outcome is None else outcome.timings,
        error=error,
        outcome=outcome,
        interrupted=interrupted,
    )
