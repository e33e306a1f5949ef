"""What the names in paths stand for, and what they look like: ``<name>``, ``<checkpoint>`` and the others."""

from __future__ import annotations

from collections.abc import Mapping

from noid.core.model.names import NAME_LENGTH_MAX
from noid.server.schemas.ports import PORT
from noid.server.schemas.vocabulary import Schema, text

NAME_PATTERN = r"^[A-Za-z0-9_](\.?[A-Za-z0-9_-])*\.?$"
"""What `noid.core.model.names.checked_name` lets pass, apart from the length."""

NAME = text(least=1, most=NAME_LENGTH_MAX, pattern=NAME_PATTERN)
CHECKPOINT_ID = text(pattern="^[0-9a-f]{16}$")

PATH_PARAMETERS: Mapping[str, Schema] = {
    "name": {**NAME, "description": "A VM of the caller."},
    "process": text(least=1, about="The id of a process of the VM."),
    "port": PORT,
    "log": text(least=1, about="The name of a log of the VM."),
    "checkpoint": text(least=1, about="The id of a checkpoint of the caller."),
    "operation": text(least=1, about="The id of an operation of the caller."),
    "token": text(least=1, about="The name of a token of the caller."),
    "user": text(least=1, about="The name of a user."),
}
