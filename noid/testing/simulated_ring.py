"""The log of a simulated process: what it wrote last, as a page of guest memory.

Pages are never changed, only replaced.
A page is ``{"start", "end", "limit", "parts": [[stream, base64], ...]}``; *parts* are the bytes from *start* to *end*.
Standard library only: this runs inside the simulated VMM process.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

Page = dict[str, Any]


def new_log(limit: int) -> Page:
    """Return the log of a process that has written nothing; it keeps *limit* bytes."""
    return {"start": 0, "end": 0, "limit": limit, "parts": []}


def appended(page: Page, stream: int, data: bytes) -> Page:
    """Return *page* with *data* at its end."""
    parts = page["parts"]
    if parts and parts[-1][0] == stream and len(parts[-1][1]) < 4096:
        data = base64.b64decode(parts[-1][1]) + data
        parts, end = parts[:-1], page["end"] - len(base64.b64decode(parts[-1][1]))
    else:
        end = page["end"]
    return {**page, "end": end + len(data), "parts": [*parts, [stream, base64.b64encode(data).decode()]]}


def trimmed(page: Page, needed_from: int | None) -> Page:
    """Return *page* without what is over its limit, but with everything from *needed_from* on."""
    start, parts = page["start"], list(page["parts"])
    keep_from = page["end"] - page["limit"]
    if needed_from is not None:
        keep_from = min(keep_from, needed_from)
    while start < keep_from:
        stream, encoded = parts.pop(0)
        data = base64.b64decode(encoded)
        surplus = min(len(data), keep_from - start)
        start += surplus
        if surplus < len(data):
            parts.insert(0, [stream, base64.b64encode(data[surplus:]).decode()])
    return page if start == page["start"] else {**page, "start": start, "parts": parts}


def pieces(page: Page, offset: int, limit: int) -> Iterator[tuple[int, int, bytes]]:
    """Yield (stream, offset, bytes) of what *page* has from *offset* on, *limit* bytes at most."""
    at = page["start"]
    for stream, encoded in page["parts"]:
        data = base64.b64decode(encoded)
        if at + len(data) > offset and limit > 0:
            skipped = max(0, offset - at)
            piece = data[skipped : skipped + limit]
            limit -= len(piece)
            yield stream, at + skipped, piece
        at += len(data)
