"""Users, as admin commands see them."""

from __future__ import annotations

from noid.server.schemas.vocabulary import integer, record

USER_REMOVED = record(
    "UserRemoved",
    "What went with a user.",
    {"vms": integer(0), "checkpoints": integer(0), "bytes": integer(0, about="On the disk, before.")},
)
