"""What a woken guest is told to be, made anew for every wake; and what its receipt is worth."""

from __future__ import annotations

import dataclasses
import secrets
import time

from noid.core.model.vms import Identity, NetLease, Receipt, ReceiptItem, WakeReason

ENTROPY_BYTES = 64
VM_GENERATION_ID = "vm-generation-id"

#: What every guest can be given, so what every receipt must speak of.
EXPECTED = ("randomness", "clock", "hostname", "machine-id", "boot-id", "generation")
#: What is good to have, where the required items do the same later.
OPTIONAL = frozenset({VM_GENERATION_ID})


def new_identity(
    hostname: str,
    vm_id: str,
    lease: NetLease | None,
    *,
    reason: WakeReason = WakeReason.CREATE,
    hook_timeout_secs: float = 0.0,
    vm_generation_id: bool = False,
) -> Identity:
    """Return the identity of VM *vm_id*. Its machine-id follows from the id, so an in-place restore keeps it."""
    return Identity(
        hostname=hostname,
        machine_id=vm_id.replace("-", ""),
        unix_ns=time.time_ns(),
        entropy=secrets.token_bytes(ENTROPY_BYTES),
        generation=time.time_ns(),  # not coarser: of a thousand clones, two woke in one millisecond
        lease=lease,
        reason=reason,
        hook_timeout_secs=hook_timeout_secs,
        vm_generation_id=vm_generation_id,
    )


def judged(receipt: Receipt, identity: Identity) -> Receipt:
    """Return *receipt* with what can be known of it from outside.

    The guest wrote it. It decides neither what was asked of it nor what is required: an item it leaves out is there as
    ``not_possible``, and one it calls done with another value than *identity* has is ``failed``. A guest that lies
    consistently is believed; it deceives nobody but its owner.
    """
    told = {item.name for item in receipt.items}
    expected = EXPECTED + (("network",) if _has_address(identity.lease) else ())
    items = [_checked(item, identity) for item in receipt.items]
    items += [
        ReceiptItem(name=name, status="not_possible", detail="the guest's agent does not do it")
        for name in expected
        if name not in told
    ]
    if VM_GENERATION_ID not in told:
        items.append(
            ReceiptItem(
                name=VM_GENERATION_ID,
                status="not_possible",
                detail="the VMM gives this kind of machine no such device",
                required=False,
            )
        )
    return Receipt(items=tuple(items))


def _checked(item: ReceiptItem, identity: Identity) -> ReceiptItem:
    wanted = {
        "hostname": identity.hostname,
        "machine-id": identity.machine_id,
        "generation": str(identity.generation),
    }.get(item.name, item.after)
    item = dataclasses.replace(item, required=item.name not in OPTIONAL)
    if item.status != "done" or item.after == wanted:
        return item
    return dataclasses.replace(item, status="failed", detail=f"the guest calls it done, but it is not {wanted!r}")


def _has_address(lease: NetLease | None) -> bool:
    return lease is not None and (lease.kind == "user" or bool(lease.guest_address))
