"""Identifiers: unique across hosts, so that records can travel."""

from __future__ import annotations

import secrets
import time
import uuid


def new_id() -> str:
    """Return a UUIDv7 (RFC 9562): sorts by the time it was made."""
    milliseconds = time.time_ns() // 1_000_000
    value = (milliseconds & ((1 << 48) - 1)) << 80 | 0x7 << 76 | secrets.randbits(12) << 64 | 0b10 << 62
    return str(uuid.UUID(int=value | secrets.randbits(62)))


def new_instance() -> str:
    """Return the name of a VM's directories: 12 hex digits, short because a unix socket path holds 107 bytes."""
    return secrets.token_hex(6)


def new_checkpoint_id() -> str:
    """Return 16 lowercase hex digits, the form the predecessor's clients expect."""
    return secrets.token_hex(8)
