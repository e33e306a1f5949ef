"""Moments, which are aware and UTC."""

from __future__ import annotations

from datetime import UTC, datetime


def now() -> datetime:
    """Return the current time, aware, UTC."""
    return datetime.now(UTC)


def wire_time(moment: datetime) -> str:
    """Return *moment* as the predecessor's clients expect it: ``YYYY-MM-DD HH:MM:SS`` in UTC."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")
