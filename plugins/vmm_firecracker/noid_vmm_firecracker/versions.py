"""Which Firecracker can do what, and the oldest one that is used at all."""

from __future__ import annotations

import re
from dataclasses import dataclass

Version = tuple[int, int, int]

VERSION_MIN: Version = (1, 15, 0)
WHY_MIN = (
    "older ones write diff snapshots of more than 3 GiB that are corrupt, and noid's checkpoints are diff snapshots"
)
NEWEST_KNOWN: Version = (1, 16, 1)
"""The newest release this plugin was read against. Newer ones are used, too."""
CLOCK_REALTIME_SINCE: Version = (1, 16, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """What one version can do beyond `VERSION_MIN`.

    Attributes:
        clock_realtime: A load can set the guest's clocks on by the age of the snapshot.
    """

    clock_realtime: bool


def abilities(version: Version) -> Abilities:
    """Return what *version* can do."""
    return Abilities(clock_realtime=version >= CLOCK_REALTIME_SINCE)


def parsed(text: str) -> Version | None:
    """Return the version in what ``--version`` prints, or None. A development build counts as what it becomes.

    The jailer is a program of the same release and says so in the same way.
    """
    found = re.search(r"(?:Firecracker|Jailer) v(\d+)\.(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2]), int(found[3])) if found else None


def shown(version: Version) -> str:
    """Return *version* as people write it."""
    return ".".join(str(part) for part in version)
