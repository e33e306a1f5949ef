"""Deleting a checkpoint, as a table. What was made from it lives on: its memory and its layers are linked, not lent.

Until the commit it can be had back: nothing is removed before that, only taken out of sight. A restore and a deletion
exclude each other through the database: a restore's page is in the journal before it looks for the row, and the
deletion takes the row away in the transaction in which it has looked for such pages.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import trio

from noid import hostfs
from noid.core.checkpoints import manifest as manifests
from noid.core.database.store import Tx
from noid.core.model.storage import Checkpoint
from noid.core.operations.saga import Facts, Saga, Step
from noid.core.operations.work import Work, given
from noid.errors import Busy

logger = logging.getLogger(__name__)


async def unlist(work: Work, facts: Facts) -> None:
    """Take the row away, unless the checkpoint is being restored: from here on nobody can begin to.

    Raises:
        Busy: it is.
        NotFound: it has gone already.
    """
    owner, checkpoint_id = given(work.user).id, facts["checkpoint_id"]

    def change(tx: Tx) -> None:
        if (kind := tx.operation_from(owner, checkpoint_id)) is not None:
            raise Busy(checkpoint_id, kind, what="checkpoint")
        tx.delete_checkpoint(owner, checkpoint_id)

    await work.services.store.write(change)


async def list_again(work: Work, facts: Facts) -> None:
    """Give the row back, if the checkpoint is there."""
    final, _ = _names(work, facts)
    fields = facts["checkpoint"]
    checkpoint = Checkpoint(**fields | {"created_at": datetime.fromisoformat(fields["created_at"])})
    if await trio.to_thread.run_sync(final.is_dir):
        await work.services.store.write(lambda tx: tx.insert_checkpoint(checkpoint))


async def withdraw(work: Work, facts: Facts) -> None:
    """Give its directory, at one instant, a name that nobody takes for a checkpoint's and every start sweeps."""
    final, partial = _names(work, facts)

    def rename() -> None:
        with contextlib.suppress(FileNotFoundError):
            final.rename(partial)
            hostfs.fsync_directory(final.parent)  # what the commit says stays true after a power cut

    with hostfs.os_errors("taking the checkpoint out of sight"):
        await trio.to_thread.run_sync(rename)


async def put_back(work: Work, facts: Facts) -> None:
    """Give it back its name, if it is whole: a power cut may take the commit back after files were removed."""
    final, partial = _names(work, facts)

    def rename() -> None:
        if manifests.path_in(partial).exists():
            partial.rename(final)

    with hostfs.os_errors("putting the checkpoint back"):
        await trio.to_thread.run_sync(rename)


def commit_gone(work: Work, facts: Facts, tx: Tx) -> None:
    """The checkpoint is gone: its row was taken away before."""


async def remove_files(work: Work, facts: Facts) -> None:
    """Remove what is left of it, its manifest first. What fails here the next start sweeps."""
    _, partial = _names(work, facts)

    def remove() -> None:
        manifests.path_in(partial).unlink(missing_ok=True)
        hostfs.remove_tree(partial)

    try:
        await trio.to_thread.run_sync(remove)
    except OSError:
        logger.exception("checkpoint %s is not entirely gone; the next start sweeps it", facts["checkpoint_id"])


def _names(work: Work, facts: Facts) -> tuple[Path, Path]:
    """Return where the checkpoint is, and where it is when it is out of sight."""
    layout, owner = work.services.layout, given(work.user).id
    return layout.checkpoint(owner, facts["checkpoint_id"]), layout.partial(owner, facts["checkpoint_id"])


def facts_of_discard(checkpoint: Checkpoint) -> Facts:
    """Name what goes, and all that is needed to have it back."""
    fields = asdict(checkpoint) | {"created_at": checkpoint.created_at.isoformat()}
    return {"checkpoint_id": checkpoint.id, "checkpoint": fields}


DELETE_CHECKPOINT: Saga[Work] = Saga(
    "checkpoint.delete",
    (Step("unlist", unlist, list_again), Step("withdraw", withdraw, put_back)),
    commit_gone,
    deadline_secs=60.0,
    needs_room=False,
)
