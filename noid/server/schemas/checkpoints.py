"""Checkpoints: what one is, and what is sent to take one."""

from __future__ import annotations

from noid.core.model.names import CHECKPOINT_LABEL_LENGTH_MAX
from noid.server.schemas.lists import LABELS, LABELS_PATCH
from noid.server.schemas.paths import CHECKPOINT_ID
from noid.server.schemas.vms import TIME, TIMINGS
from noid.server.schemas.vocabulary import extended, integer, nullable, record, text

LABEL = text(most=CHECKPOINT_LABEL_LENGTH_MAX)

TAKE = record("TakeCheckpoint", "A checkpoint to be taken.", {"label?": nullable(LABEL), "labels?": LABELS})

CHANGE = record(
    "ChangeCheckpoint",
    "What of a checkpoint changes; what is missing stays.",
    {"label?": nullable(LABEL), "labels?": LABELS_PATCH},
)

CHECKPOINT = record(
    "Checkpoint",
    "A frozen VM. It outlives its VM.",
    {
        "id": CHECKPOINT_ID,
        "vm_name": text(),
        "label": nullable(LABEL),
        "created_at": TIME,
        "cpus": integer(1),
        "mem_mib": integer(1),
        "image": text(),
        "parent": nullable(text(), about="The checkpoint its VM was restored from."),
        "labels": LABELS,
    },
)

CHECKPOINT_CHANGED = extended("CheckpointChanged", "A checkpoint after a change.", CHECKPOINT, {"timings": TIMINGS})

CHECKPOINT_TAKEN = extended(
    "CheckpointTaken",
    "A checkpoint, and what it took.",
    CHECKPOINT,
    {"timings": TIMINGS, "changed_bytes": nullable(integer(0, about="Of memory, since what it is based on."))},
)
