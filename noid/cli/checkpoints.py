"""``noid checkpoint``, ``checkpoints``, ``restore``: freezing VMs and waking them again."""

from __future__ import annotations

import click

from noid.cli.options import Command, call, resolved_vm, with_endpoint, with_json, with_name_option, with_vm
from noid.cli.output import printable, progress, show, table
from noid.cli.receipts import lacking_lines
from noid.client import api
from noid.core.model import checked_name


@click.command(cls=Command, epilog="noid checkpoint web --label before-upgrade")
@with_vm
@click.option("--label", metavar="TEXT", help="A word to find it by.")
@with_json
@with_endpoint
def checkpoint(name: str | None, name_option: str | None, label: str | None) -> None:
    """Freeze a running VM: memory, processes, disk. It runs on."""
    source = resolved_vm(name, name_option)
    with progress(f"Checkpointing VM {source!r}"):
        made = api.checkpoint_vm(call().endpoint, source, label)
    suffix = f" (label: {printable(made['label'])})" if made["label"] is not None else ""
    show(made, f"Checkpoint '{made['id']}' created{suffix}")


@click.command(cls=Command, epilog="noid checkpoints web")
@with_vm
@with_json
@with_endpoint
def checkpoints(name: str | None, name_option: str | None) -> None:
    """Show the checkpoints of a VM."""
    source = resolved_vm(name, name_option)
    found = api.checkpoints(call().endpoint, source)
    rows = [[item["id"], "-" if item["label"] is None else item["label"], item["created_at"]] for item in found]
    show(found, table(("id", "label", "created"), rows) if rows else f"No checkpoints for VM '{source}'.")


@click.command(
    cls=Command,
    epilog="""
noid restore web 0123456789abcdef
noid restore web 0123456789abcdef --as copy
noid restore 0123456789abcdef                  (the VM set by `noid use`)
""",
)
@click.argument("words", nargs=-1, metavar="[NAME] CHECKPOINT_ID")
@with_name_option
@click.option("--as", "new_name", metavar="NEW_NAME", help="Leave the VM alone and make a new one.")
@with_json
@with_endpoint
def restore(words: tuple[str, ...], name_option: str | None, new_name: str | None) -> None:
    """Put a VM back to a checkpoint, or make a new VM from one."""
    if not 1 <= len(words) <= 2:
        raise click.UsageError("Give a checkpoint's id, and before it the VM's name: noid restore web 0123456789abcdef")
    *names, checkpoint_id = words
    source = resolved_vm(names[0] if names else None, name_option)
    if new_name is not None:
        checked_name(new_name, "new VM name")
    with progress(f"Restoring {new_name or source!r}"):
        vm = api.restore_vm(call().endpoint, source, checkpoint_id, new_name)
    restored = f"VM '{vm['name']}' restored from checkpoint '{printable(checkpoint_id)}'"
    show(vm, "\n".join([restored, *lacking_lines(vm)]))
