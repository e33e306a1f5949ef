"""``noid create``, ``list``, ``info``, ``rename``, ``destroy``: a VM's life."""

from __future__ import annotations

import sys

import click

from noid.cli import colours
from noid.cli.labels import given, warn_unless_kept
from noid.cli.new_vm import NewVm, with_shape
from noid.cli.options import (
    call,
    chosen_name,
    command,
    confirmed,
    for_each,
    resolved_vm,
    resolved_vms,
    with_labels,
    with_name_option,
    with_vm,
    with_vms,
    with_yes,
)
from noid.cli.output import printable, show
from noid.cli.receipts import lacking_lines, summary
from noid.client.answers import VmInfo
from noid.client.calls import vms
from noid.client.settings import active_vm, set_active_vm


def _no_files(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None:
        raise click.UsageError(
            f"No such option {param.opts[0]!r}. Kernel and root file system belong to images: "
            "noid-server image import on the server, then noid create --image NAME."
        )


@command(
    examples="""
noid create web --cpus 2 --mem 512
noid create                       a name is made up and printed
noid create copy --from 0123456789abcdef
noid create --use                 commands in this directory then mean it
""",
)
@with_vm
@with_shape
@with_labels("A word of yours to find it by; may be repeated. See: noid label.")
@click.option("--use", "used", is_flag=True, help="Make it the VM that commands in this directory mean.")
@click.option("--kernel", hidden=True, expose_value=False, callback=_no_files)
@click.option("--rootfs", hidden=True, expose_value=False, callback=_no_files)
def create(
    name: str | None,
    name_option: str | None,
    cpus: int,
    mem: int,
    image: str | None,
    checkpoint: str | None,
    labels: tuple[str, ...],
    used: bool,
) -> None:
    """Make a VM and wait until it answers. Without a name it gets one.

    The first of a shape (CPUs, memory, image) boots and may take a minute; later ones wake in milliseconds.
    """
    from noid.cli.friendly_names import unused

    wanted = chosen_name(name, name_option)
    new = NewVm.asked(cpus=cpus, mem_mib=mem, image=image, checkpoint=checkpoint, labels=given(labels))

    def make(name: str) -> VmInfo:
        return call().perform(new.request(name), f"Creating VM {name!r}")

    vm = unused(make) if wanted is None else make(wanted)
    warn_unless_kept(new.labels, vm)
    lines = [f"VM '{vm['name']}' created (state: {vm['state']})", *lacking_lines(vm)]
    if used:
        set_active_vm(vm["name"])
        lines.append(f"Active VM set to '{vm['name']}'")
    show(vm, "\n".join(lines), brief=vm["name"])


@command(examples="noid info web")
@with_vm
def info(name: str | None, name_option: str | None) -> None:
    """Show one VM."""
    vm = call().perform(vms.get(resolved_vm(name, name_option)))
    fields = [
        ("Name:", vm["name"]),
        ("State:", vm["state"]),
        ("CPUs:", vm["cpus"]),
        ("Memory:", f"{vm['mem_mib']} MiB"),
        ("Created:", vm["created_at"]),
    ]
    if "receipt" in vm:  # of the predecessor, whose templates scripts depend on, there is none
        fields.append(("Receipt:", summary(vm)))
    if since := vm.get("unresponsive_since"):
        fields.append(("Silent:", f"its guest has not answered since {since} UTC"))
    if ended := vm.get("ended"):
        fields.append(("Ended:", ended))
    lines = [f"{label:<9}{printable(str(value))}" for label, value in fields]
    lines[1] = f"{'State:':<9}{colours.state(printable(vm['state']), sys.stdout)}"
    show(vm, "\n".join([*lines, *lacking_lines(vm)]), brief=vm["name"])


@command(examples="noid rename web www")
@click.argument("words", nargs=-1, metavar="[NAME] NEW_NAME")
@with_name_option
def rename(words: tuple[str, ...], name_option: str | None) -> None:
    """Give a VM another name, running or not. Its checkpoints follow.

    Its guest is told when it starts the next time. A directory whose VM it is (`noid use`) goes on meaning it.
    """
    from noid.core.model.names import checked_name

    if not 1 <= len(words) <= 2:
        raise click.UsageError("Give the VM's new name, and before it the one it has: noid rename web www")
    *names, new_name = words
    old = resolved_vm(names[0] if names else None, name_option)
    checked_name(new_name, "new VM name")
    vm = call().perform(vms.rename(old, new_name), f"Renaming VM {old!r}")
    lines = [f"VM '{old}' renamed to '{vm['name']}'"]
    if (marked := active_vm()) is not None and marked[0] == old:
        set_active_vm(vm["name"])
        lines.append(f"Active VM set to '{vm['name']}'")
    show(vm, "\n".join(lines), brief=vm["name"])


@command(examples="noid destroy web\nnoid destroy web db --yes")
@with_vms
@with_yes
def destroy(names: tuple[str, ...], name_option: str | None) -> None:
    """End VMs and remove them. Their checkpoints stay.

    On a terminal it asks first.
    """
    doomed = resolved_vms(names, name_option)
    confirmed(f"Destroy {'VM' if len(doomed) == 1 else 'VMs'} {', '.join(map(repr, doomed))}?")

    def act(name: str) -> None:
        call().perform(vms.destroy(name), f"Destroying VM {name!r}")
        show({"name": name, "destroyed": True}, f"VM '{name}' destroyed", brief=name)

    for_each(doomed, act)
