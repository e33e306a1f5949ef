"""What a woken guest is told to be: made anew for every wake, from the host's clock and randomness."""

from __future__ import annotations

import secrets
import time

from noid.core.model import Identity, NetLease

ENTROPY_BYTES = 64


def new_identity(hostname: str, vm_id: str, lease: NetLease | None) -> Identity:
    """Return the identity of VM *vm_id*. Its machine-id follows from the id, so an in-place restore keeps it."""
    return Identity(
        hostname=hostname,
        machine_id=vm_id.replace("-", ""),
        unix_ns=time.time_ns(),
        entropy=secrets.token_bytes(ENTROPY_BYTES),
        generation=time.time_ns() // 1_000_000,
        lease=lease,
    )
