"""VMs: what one is, and what is sent to make, stop and restore one."""

from __future__ import annotations

from noid.core.model.vms import CPUS_MAX, DEFAULT_CPUS, DEFAULT_MEM_MIB, MEM_MIB_MIN, VmState
from noid.core.vms.power import GRACE_SECS, GRACE_SECS_MAX
from noid.server.schemas.lists import LABELS, LABELS_PATCH
from noid.server.schemas.paths import NAME
from noid.server.schemas.vocabulary import (
    array,
    boolean,
    choice,
    extended,
    integer,
    mapping,
    nullable,
    number,
    record,
    text,
)

TIME = text(pattern=r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d$", about="UTC.")
TIMINGS = mapping(number(0), about="Seconds by phase.")

CREATE = record(
    "CreateVm",
    "A VM to be made.",
    {
        "name": NAME,
        "cpus?": integer(1, CPUS_MAX, default=DEFAULT_CPUS),
        "mem_mib?": integer(MEM_MIB_MIN, default=DEFAULT_MEM_MIB, about="At most what the host has."),
        "image?": nullable(NAME, about="An image of the server; `default` if missing."),
        "labels?": LABELS,
    },
)

CHANGE = record(
    "ChangeVm",
    "What of a VM changes; what is missing stays.",
    {"name?": nullable(NAME, about="Its name from now on."), "labels?": LABELS_PATCH},
)

STOP = record(
    "StopVm",
    "How a guest is stopped.",
    {
        "timeout_secs?": number(
            0, GRACE_SECS_MAX, default=GRACE_SECS, about="How long it may take to shut down; 0 is not asking it."
        ),
        "force?": boolean(default=False, about="End the machine at once, which is like pulling the plug."),
    },
)

RESTORE = record(
    "RestoreCheckpoint",
    "A checkpoint to continue.",
    {
        "checkpoint_id": text(),
        "new_name?": nullable(NAME, about="As a VM of that name; without it, in place."),
        "labels?": LABELS,
    },
)

RECEIPT_ITEM = record(
    "ReceiptItem",
    "One thing that makes a clone its own.",
    {
        "name": text(),
        "status": choice("done", "failed", "not_possible"),
        "before": text(),
        "after": text(),
        "detail": text(),
        "required": boolean(),
    },
)

VM = record(
    "Vm",
    "A VM as it is now.",
    {
        "name": NAME,
        "state": choice(*(state.value for state in VmState)),
        "cpus": integer(1),
        "mem_mib": integer(1),
        "created_at": TIME,
        "id": text(),
        "generation": integer(0, about="Grows with every change."),
        "busy": nullable(text(), about="The operation under way."),
        "image": text(),
        "network": text(),
        "origin": nullable(text(), about="The template or checkpoint it woke from."),
        "receipt": nullable(array(RECEIPT_ITEM), about="What made it its own."),
        "ended": nullable(text(), about="How its last machine ended, where it has none."),
        "responding": nullable(boolean(), about="Whether its guest agent answers; null: nobody knows."),
        "unresponsive_since": nullable(TIME, about="When its guest was first asked in vain, UTC."),
        "labels": LABELS,
    },
)

VM_CHANGED = extended(
    "VmChanged",
    "A VM after a change.",
    VM,
    {
        "timings": TIMINGS,
        "how?": text(about="How it stopped: `clean`, `forced`, `already stopped`, `killed after 30 s`."),
    },
)
