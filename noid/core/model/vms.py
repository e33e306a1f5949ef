"""A VM: what it shall be, what runs it, what became of it."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from noid.core.model.names import checked_labels, checked_name
from noid.errors import InvalidRequest

DEFAULT_CPUS = 1
DEFAULT_MEM_MIB = 2048
CPUS_MAX = 32
MEM_MIB_MIN = 64


class VmState(enum.StrEnum):
    """What is true of a VM. What is being done with it is `Vm.busy`."""

    CREATING = "creating"
    RUNNING = "running"
    PAUSED = "paused"
    RESTORING = "restoring"
    STOPPED = "stopped"
    DEAD = "dead"
    DESTROYING = "destroying"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessRef:
    """A process for sure: a pid alone may have been reused. *start_ticks* is field 22 of ``/proc/<pid>/stat``."""

    pid: int
    start_ticks: int
    boot_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NetLease:
    """What a VM's network card is connected to. *kind* is ``none``, ``user`` or ``tap``."""

    kind: str
    mac: str | None = None
    guest_address: str | None = None
    gateway: str | None = None
    tap_name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VmSpec:
    """What a VM shall be. `checked` is the one place that says whether it can be."""

    name: str
    cpus: int = DEFAULT_CPUS
    mem_mib: int = DEFAULT_MEM_MIB
    image: str = "default"
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)

    def checked(self, host_mem_mib: int) -> VmSpec:
        """Return self.

        Raises:
            InvalidRequest: names the field and its range.
        """
        checked_name(self.name)
        checked_name(self.image, "image name")
        checked_labels(self.labels)
        if not 1 <= self.cpus <= CPUS_MAX:
            raise InvalidRequest(f"cpus is {self.cpus}; it must be between 1 and {CPUS_MAX}.")
        if not MEM_MIB_MIN <= self.mem_mib <= host_mem_mib:
            raise InvalidRequest(
                f"mem_mib is {self.mem_mib}; it must be between {MEM_MIB_MIN} and {host_mem_mib}, the host's memory."
            )
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiptItem:
    """One thing that makes a clone its own. *status* is ``done``, ``failed`` or ``not_possible``.

    *required* ones must be done where ``require_unique`` is strict.
    """

    name: str
    status: str
    before: str = ""
    after: str = ""
    detail: str = ""
    required: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What the guest agent changed before the first user command could run (clock, randomness, names)."""

    items: tuple[ReceiptItem, ...] = ()

    @property
    def complete(self) -> bool:
        """No item failed."""
        return all(item.status != "failed" for item in self.items)

    @property
    def lacking(self) -> tuple[ReceiptItem, ...]:
        """The required items that are not done: what the guest may still share with its twins."""
        return tuple(item for item in self.items if item.required and item.status != "done")


class WakeReason(enum.StrEnum):
    """Why a guest is told who it is. The image's hooks are told, too."""

    CREATE = "create"
    RESTORE = "restore"
    CLONE = "clone"
    BOOT = "boot"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a woken guest is told to be. *entropy* is fresh host randomness, at least 32 bytes.

    *generation* is greater with every wake, wherever the guest came from: a program that sees it grow was cloned.
    *hook_timeout_secs* is what the image's own programs may take together before the guest answers; 0: none is run.
    *vm_generation_id* says that the machine has that device, see `noid.core.backends.VmmFeatures`.
    """

    hostname: str
    machine_id: str
    unix_ns: int
    entropy: bytes = field(repr=False)
    generation: int = 0
    lease: NetLease | None = None
    reason: WakeReason = WakeReason.CREATE
    hook_timeout_secs: float = 0.0
    vm_generation_id: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Vm:
    """A VM as the store knows it.

    *instance* names the VM's directory and run directory; an in-place restore gives the VM a new one. *origin* is the
    checkpoint or template it was restored from. *generation* grows with every change of the row. *ended* says how its
    last machine ended. *labels* are its owner's words. What follows is of the moment and not stored: *busy* names the
    operation that holds the VM, *responding* says whether its guest answers (None: not known), and
    *unresponsive_since* when it was first asked in vain.
    """

    id: str
    owner: str
    name: str
    state: VmState
    generation: int
    cpus: int
    mem_mib: int
    image: str
    instance: str
    network: str = "none"
    lease: NetLease | None = None
    process: ProcessRef | None = None
    origin: str | None = None
    receipt: Receipt | None = None
    created_at: datetime
    ended: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    busy: str | None = None
    responding: bool | None = None
    unresponsive_since: datetime | None = None

    def __hash__(self) -> int:
        """Return what tells rows apart; the rest is compared."""
        return hash((self.id, self.generation))
