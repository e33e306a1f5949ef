"""What VMs' processes are kept in, as the agent was told. What is in force, `noid.vmmhost.sandbox` finds out."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path

DEFAULT_UIDS = range(1900000000, 1900065536)
"""Numbers that neither systemd nor useradd nor container engines give away by themselves."""


class SandboxMode(enum.StrEnum):
    """How much is demanded. *auto*: as much as works here."""

    AUTO = "auto"
    FULL = "full"
    LIMITS = "limits"
    OFF = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxSettings:
    """``[sandbox]``, read.

    Attributes:
        mode: What is demanded.
        uids: The user ids VMs' processes get, one each. The first is no user's but everybody's group.
        cgroup: Below which cgroup those of VMs are made, in every hierarchy. None: a place is found.
        overhead_mib: What a VMM may use beside the guest's memory.
        readable: What of the host a VMM may read beyond its own program and the libraries.
    """

    mode: SandboxMode = SandboxMode.OFF
    uids: range = DEFAULT_UIDS
    cgroup: Path | None = None
    overhead_mib: int = 256
    readable: tuple[Path, ...] = ()
