"""``noid checkpoint``, ``checkpoints``, ``restore``: freezing VMs and waking them again."""

from __future__ import annotations

import click

from noid.cli.options import call, command, resolved_vm, with_name_option, with_vm
from noid.cli.output import printable, show, table
from noid.cli.receipts import lacking_lines
from noid.client.calls import checkpoints as calls
from noid.core.model import checked_name


@command(examples="noid checkpoint web --label before-upgrade")
@with_vm
@click.option("--label", metavar="TEXT", help="A word to find it by.")
def checkpoint(name: str | None, name_option: str | None, label: str | None) -> None:
    """Freeze a running VM: memory, processes, disk. It runs on."""
    source = resolved_vm(name, name_option)
    made = call().perform(calls.take(source, label), f"Checkpointing VM {source!r}")
    suffix = f" (label: {printable(made['label'])})" if made["label"] is not None else ""
    show(made, f"Checkpoint '{made['id']}' created{suffix}", brief=made["id"])


@command(examples="noid checkpoints web")
@with_vm
def checkpoints(name: str | None, name_option: str | None) -> None:
    """Show the checkpoints of a VM."""
    source = resolved_vm(name, name_option)
    found = call().perform(calls.of_vm(source))
    rows = [[item["id"], "-" if item["label"] is None else item["label"], item["created_at"]] for item in found]
    text = table(("id", "label", "created"), rows) if rows else f"No checkpoints for VM '{source}'."
    show(found, text, brief="\n".join(item["id"] for item in found))


@command(
    examples="""
noid restore web 0123456789abcdef
noid restore web 0123456789abcdef --as copy
noid restore 0123456789abcdef                  (the VM set by `noid use`)
""",
)
@click.argument("words", nargs=-1, metavar="[NAME] CHECKPOINT_ID")
@with_name_option
@click.option("--as", "new_name", metavar="NEW_NAME", help="Leave the VM alone and make a new one.")
def restore(words: tuple[str, ...], name_option: str | None, new_name: str | None) -> None:
    """Put a VM back to a checkpoint, or make a new VM from one."""
    if not 1 <= len(words) <= 2:
        raise click.UsageError("Give a checkpoint's id, and before it the VM's name: noid restore web 0123456789abcdef")
    *names, checkpoint_id = words
    source = resolved_vm(names[0] if names else None, name_option)
    if new_name is not None:
        checked_name(new_name, "new VM name")
    request = calls.restore(source, checkpoint_id, new_name)
    vm = call().perform(request, f"Restoring {new_name or source!r}")
    restored = f"VM '{vm['name']}' restored from checkpoint '{printable(checkpoint_id)}'"
    show(vm, "\n".join([restored, *lacking_lines(vm)]), brief=vm["name"])
