"""Records as rows of the store, and back."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any, Protocol

from noid.core.model.storage import Checkpoint
from noid.core.model.users import User
from noid.core.model.vms import NetLease, ProcessRef, Receipt, ReceiptItem, Vm, VmState

VMS_REMEMBERED = 2048
"""So many of the latest VMs seen are not read from JSON, or put into it, again."""


class Row(Protocol):
    """A row of a table, by column."""

    def keys(self) -> list[str]:
        """Return the names of the columns."""
        ...

    def __getitem__(self, column: str, /) -> Any:
        """Return what is in a column."""
        ...


def text_of(moment: datetime) -> str:
    """Return a time as it is stored: it sorts as times do."""
    return moment.isoformat(timespec="microseconds")


def encode(value: Any) -> Any:
    """Return *value* as SQLite stores it: records as JSON, times as RFC 3339."""
    if isinstance(value, datetime):
        return text_of(value)
    if isinstance(value, NetLease | ProcessRef | Receipt):
        return json.dumps(asdict(value))
    if isinstance(value, Mapping):
        return json.dumps(value)
    return str(value) if isinstance(value, VmState) else value


def vm_row(vm: Vm) -> dict[str, Any]:
    """Return the columns of a VM's row."""
    names = (name for name in Vm.__dataclass_fields__ if name not in _OF_THE_MOMENT)
    return {name: encode(getattr(vm, name)) for name in names}


@functools.lru_cache(maxsize=VMS_REMEMBERED)
def vm_of(row: Row) -> Vm:
    """Return the VM that a row is; of an equal row the same one, which is a record and never changes."""
    lease, process, receipt = (json.loads(row[name] or "null") for name in ("lease", "process", "receipt"))
    items: Iterable[dict[str, Any]] = (receipt or {}).get("items", ())
    return Vm(
        **{key: row[key] for key in row.keys() if key not in _DECODED},  # noqa: SIM118  # SQLite's iterate over values
        state=VmState(row["state"]),
        lease=NetLease(**lease) if lease else None,
        process=ProcessRef(**process) if process else None,
        receipt=Receipt(items=tuple(ReceiptItem(**item) for item in items)) if receipt else None,
        labels=json.loads(row["labels"]),
        created_at=datetime.fromisoformat(row["created_at"]),
    )


#: What a VM has that its row has not.
_OF_THE_MOMENT = frozenset({"busy", "responding", "unresponsive_since"})
_DECODED = frozenset({"state", "lease", "process", "receipt", "labels", "created_at"})


def user_of(row: Row) -> User:
    """Return the user that a row is."""
    return User(id=row["id"], name=row["name"], created_at=datetime.fromisoformat(row["created_at"]))


def checkpoint_of(row: Row) -> Checkpoint:
    """Return the checkpoint that a row is."""
    fields = {key: row[key] for key in row.keys() if key not in _DECODED}  # noqa: SIM118  # SQLite's iterate over values
    labels, created_at = json.loads(row["labels"]), datetime.fromisoformat(row["created_at"])
    return Checkpoint(**fields, labels=labels, created_at=created_at)
