"""One operation's live objects, shared by the steps of every saga that changes a VM."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from noid.core.backends import FreezePlan, Machine
from noid.core.checkpoints.freezing import Frozen
from noid.core.checkpoints.templates import Source, Templates
from noid.core.model.storage import Checkpoint, Volume
from noid.core.model.users import User
from noid.core.model.vms import NetLease, Receipt, Vm, VmSpec
from noid.core.operations.saga import Facts
from noid.core.services import Services
from noid.core.vms.supervisor import GuestLink


@dataclass(slots=True, kw_only=True)
class Work:
    """One operation's live objects. Recovery starts from a fresh one: undo may rely on facts only."""

    services: Services
    templates: Templates
    user: User | None = None
    take: Callable[[VmSpec], Awaitable[Warm | None]] | None = None
    take_copy: Callable[[str], Awaitable[Warm | None]] | None = None
    stands_still: bool = False
    vm: Vm | None = None
    spec: VmSpec | None = None
    source: Source | None = None
    lease: NetLease | None = None
    volume: Volume | None = None
    machine: Machine | None = None
    link: GuestLink | None = None
    receipt: Receipt | None = None
    ready: tuple[str, ...] | None = None
    freeze_plan: FreezePlan | None = None
    frozen: Frozen | None = None
    checkpoint: Checkpoint | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Warm:
    """A machine that nobody has yet (`noid.core.vms.pool`): the facts it was made with, and its live objects.

    *key* is the fingerprint of the template it has woken from, or the id of the checkpoint it is a copy of.
    """

    key: str
    facts: Facts
    work: Work


T = TypeVar("T")


def given(value: T | None) -> T:
    """Return what an earlier step has put there. A missing one is a step out of order, which is a bug."""
    if value is None:
        raise RuntimeError("a step ran before the one that provides what it needs")
    return value
