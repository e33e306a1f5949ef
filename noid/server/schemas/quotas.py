"""Quotas: what a user may have, and has."""

from __future__ import annotations

from noid.core.people.quotas import RESOURCES
from noid.server.schemas.vocabulary import integer, nullable, record, shape

QUOTA = record(
    "Quota",
    "What the caller may have of each resource, and has.",
    {
        "limits": shape({resource: nullable(integer(0)) for resource in RESOURCES}, about="null: no limit."),
        "use": shape({resource: integer(0) for resource in RESOURCES}),
    },
)
