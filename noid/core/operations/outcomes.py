"""What operations are and what they come to: records that outlive the agent that carried them out."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from noid.core.model.storage import Checkpoint
from noid.core.model.vms import Vm
from noid.errors import NoidError


class OperationState(enum.StrEnum):
    """Where an operation is."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What an operation came to. *timings* are its phases in seconds; *changed_bytes* a checkpoint's memory delta.

    *kind* is its saga's; *operation* its id, None where there was nothing to do. *vm* is the VM as it is then, None if
    it is gone. *how* says how a machine that was to end has ended (`noid.core.vms.power`).
    """

    kind: str
    operation: str | None = None
    vm: Vm | None = None
    checkpoint: Checkpoint | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    changed_bytes: int | None = None
    how: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """An operation at a moment. *vm* is the name it was asked about.

    *step* is where it is, or where it failed. *outcome* is there once it has succeeded, *error* when it has failed or
    was cancelled; it then has been undone, or will be by the next start. *interrupted* is whether it failed for
    nothing but the agent's end: asked for again, it may well succeed.
    """

    id: str
    kind: str
    owner: str
    vm: str
    state: OperationState
    step: str | None
    started_at: datetime
    ended_at: datetime | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    error: NoidError | None = None
    outcome: Outcome | None = None
    interrupted: bool = False


class Recorded(NoidError):
    """An error that an operation ended with, read back from the journal: its text, code and status are as they were."""

    def __init__(self, text: str, code: str, status: int) -> None:
        super().__init__(text)
        self.code = code
        self.status = status
