"""``noid checkpoint``, ``checkpoints``, ``restore``, ``rm``: freezing VMs and waking them again."""

from __future__ import annotations

import click

from noid.cli.checkpoint_choice import Checkpoints, Chosen
from noid.cli.labels import labelled
from noid.cli.options import (
    call,
    chosen_name,
    command,
    confirmed,
    for_each,
    resolved_vm,
    with_labels,
    with_name_option,
    with_vm,
    with_yes,
)
from noid.cli.output import printable, show, table
from noid.cli.receipts import lacking_lines
from noid.client.answers import VmInfo
from noid.client.calls import checkpoints as calls
from noid.client.errors import ServerError
from noid.client.settings import active_vm
from noid.core.model.names import checked_name
from noid.errors import Conflict, NoidError, NotFound


@command(examples="noid checkpoint web --label before-upgrade")
@with_vm
@click.option("--label", metavar="TEXT", help="A word to find it by.")
def checkpoint(name: str | None, name_option: str | None, label: str | None) -> None:
    """Freeze a running VM: memory, processes, disk. It runs on."""
    source = resolved_vm(name, name_option)
    made = call().perform(calls.take(source, label), f"Checkpointing VM {source!r}")
    suffix = f" (label: {printable(made['label'])})" if made["label"] is not None else ""
    show(made, f"Checkpoint '{made['id']}' created{suffix}", brief=made["id"])


@command(examples="noid checkpoints web\nnoid checkpoints --all")
@with_vm
@click.option("--all", "all_vms", is_flag=True, help="Those of all VMs, also of VMs that are gone.")
@with_labels("Only those with this label; may be repeated. See: noid label.", "KEY[=VALUE]")
def checkpoints(name: str | None, name_option: str | None, all_vms: bool, labels: tuple[str, ...]) -> None:
    """Show the checkpoints of a VM, or all there are where no VM is chosen."""
    source = chosen_name(name, name_option)
    if source is not None and all_vms:
        raise click.UsageError(f"--all shows every VM's, and {source!r} is named.")
    if source is None and not all_vms:
        source = _active()
    found = Checkpoints().of(source) if not labels else labelled(call().perform(calls.every(vm=source, labels=labels)))
    rows = [
        [item["id"], item["vm_name"], "-" if item["label"] is None else item["label"], item["created_at"]]
        for item in found
    ]
    if source is None:
        text = table(("id", "vm", "label", "created"), rows) if rows else "No checkpoints found."
    else:
        rows = [[id_, label, created] for id_, _, label, created in rows]
        text = table(("id", "label", "created"), rows) if rows else f"No checkpoints for VM '{source}'."
    show(found, text, brief="\n".join(item["id"] for item in found))


@command(
    examples="""
noid restore web 0123456789abcdef
noid restore web before-upgrade --as copy
noid restore 0123                         (the VM set by `noid use`)
""",
)
@click.argument("words", nargs=-1, metavar="[NAME] CHECKPOINT")
@with_name_option
@click.option("--as", "new_name", metavar="NEW_NAME", help="Leave the VM alone and make a new one.")
def restore(words: tuple[str, ...], name_option: str | None, new_name: str | None) -> None:
    """Put a VM back to a checkpoint, or make a new VM from one.

    CHECKPOINT is its id, a beginning of it that no other has (four digits or more), or its label.
    """
    if not 1 <= len(words) <= 2:
        raise click.UsageError("Give a checkpoint's id, and before it the VM's name: noid restore web 0123456789abcdef")
    *names, text = words
    named = chosen_name(names[0] if names else None, name_option)
    if new_name is not None:
        checked_name(new_name, "new VM name")
    known = Checkpoints()
    if named is not None:
        chosen = known.meant(text, named)
        vm = _restore(chosen, new_name)
    elif (active := _active()) is None:
        chosen = known.meant(text, None)
        vm = _restore(chosen, new_name)
    else:
        chosen, vm = _restore_active(known, text, active, new_name)
    restored = f"VM '{vm['name']}' restored from checkpoint '{chosen.id}'"
    show(vm, "\n".join([restored, *lacking_lines(vm)]), brief=vm["name"])


def _restore_active(known: Checkpoints, text: str, active: str, new_name: str | None) -> tuple[Chosen, VmInfo]:
    """Restore what *text* means of this directory's VM. If it is another's, only a new VM can be meant."""
    chosen, refused = Chosen(vm=active, id=text), None
    try:
        chosen = known.meant(text, active)
        return chosen, _restore(chosen, new_name)
    except (ServerError, NotFound) as error:
        if getattr(error, "status", None) not in (NotFound.status, Conflict.status):
            raise
        refused = error
    try:
        elsewhere = known.meant(text, None)
    except NotFound:
        raise refused from None
    if elsewhere.vm == active:
        raise refused
    if new_name is None:
        raise NoidError(
            f"checkpoint {elsewhere}, and this directory's VM is '{active}'. Put '{elsewhere.vm}' back with `noid "
            f"restore {elsewhere.vm} {elsewhere.id}`, or make a new VM of it with `--as NAME`."
        )
    return elsewhere, _restore(elsewhere, new_name)


def _restore(chosen: Chosen, new_name: str | None) -> VmInfo:
    return call().perform(calls.restore(chosen.vm, chosen.id, new_name), f"Restoring {new_name or chosen.vm!r}")


def _active() -> str | None:
    marked = active_vm()
    return None if marked is None else checked_name(marked[0], f"VM name in {marked[1]}")


@command(
    examples="""
noid rm 0123456789abcdef
noid rm before-upgrade 0123 --yes
noid rm web/golden
""",
)
@click.argument("texts", nargs=-1, required=True, metavar="CHECKPOINT...")
@with_name_option
@with_yes
def rm(texts: tuple[str, ...], name_option: str | None) -> None:
    """Remove checkpoints. VMs and checkpoints that were made from them live on.

    CHECKPOINT is its id, a beginning of it that no other has (four digits or more), or its label; VM/CHECKPOINT says of
    which VM. On a terminal it asks first.
    """
    known, vm = Checkpoints(), chosen_name(None, name_option)
    doomed = list(dict.fromkeys(known.meant(text, vm) for text in texts))
    confirmed(f"Remove {'checkpoint' if len(doomed) == 1 else 'checkpoints'} {', '.join(map(str, doomed))}?")
    whose = {chosen.id: chosen.vm for chosen in doomed}

    def act(id_: str) -> None:
        call().perform(calls.remove(whose[id_], id_), f"Removing checkpoint {id_!r}")
        show({"id": id_, "vm_name": whose[id_], "removed": True}, f"Checkpoint '{id_}' removed", brief=id_)

    for_each(list(whose), act)
