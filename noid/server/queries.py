"""What a query says, checked: numbers with their ranges."""

from __future__ import annotations

import math

from noid.errors import InvalidRequest


def seconds(name: str, text: str | None, default: float, most: float) -> float:
    """Return the seconds that a query parameter *name* says, *default* if it is not there.

    Raises:
        InvalidRequest: no number, or out of range.
    """
    if text is None:
        return default
    try:
        secs = float(text)
    except ValueError:
        secs = math.nan
    if not 0 <= secs <= most:
        raise InvalidRequest(f"{name} is {text[:40]!r}; it must be a number from 0 to {most:g}.")
    return secs
