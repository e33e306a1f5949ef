"""``noid create``, ``list``, ``info``, ``destroy``: a VM's life."""

from __future__ import annotations

import click

from noid.cli.options import (
    call,
    chosen_name,
    command,
    confirmed,
    for_each,
    resolved_vm,
    resolved_vms,
    with_vm,
    with_vms,
    with_yes,
)
from noid.cli.output import printable, show, table
from noid.cli.receipts import lacking_lines, summary
from noid.client.answers import VmInfo
from noid.client.calls import vms

DEFAULT_CPUS = 1
DEFAULT_MEM_MIB = 2048


def _no_files(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None:
        raise click.UsageError(
            f"No such option {param.opts[0]!r}. Kernel and root file system belong to images: "
            "noid-server image import on the server, then noid create --image NAME."
        )


@command(examples="noid create web --cpus 2 --mem 512")
@with_vm
@click.option("--cpus", type=int, default=DEFAULT_CPUS, show_default=True, metavar="N", help="Virtual CPUs.")
@click.option("--mem", type=int, default=DEFAULT_MEM_MIB, show_default=True, metavar="MIB", help="Memory.")
@click.option("--image", metavar="IMAGE", help="What it boots; the server's default if not given.")
@click.option("--kernel", hidden=True, expose_value=False, callback=_no_files)
@click.option("--rootfs", hidden=True, expose_value=False, callback=_no_files)
def create(name: str | None, name_option: str | None, cpus: int, mem: int, image: str | None) -> None:
    """Make a VM and wait until it answers.

    The first of a shape (CPUs, memory, image) boots and may take a minute; later ones wake in milliseconds.
    """
    wanted = chosen_name(name, name_option)
    if wanted is None:
        raise click.UsageError("Missing argument 'NAME'. A new VM needs a name: noid create web")
    vm = call().perform(vms.create(wanted, cpus=cpus, mem_mib=mem, image=image), f"Creating VM {wanted!r}")
    text = "\n".join([f"VM '{vm['name']}' created (state: {vm['state']})", *lacking_lines(vm)])
    show(vm, text, brief=vm["name"])


@command("list", examples="noid list")
def list_() -> None:
    """Show your VMs."""
    found = call().perform(vms.every())
    header = ("name", "state", "cpus", "mem (MiB)", "created")
    rows = [[vm["name"], _shown_state(vm), str(vm["cpus"]), str(vm["mem_mib"]), vm["created_at"]] for vm in found]
    show(found, table(header, rows) if rows else "No VMs found.", brief="\n".join(vm["name"] for vm in found))


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
        ("Receipt:", summary(vm)),
    ]
    if since := vm.get("unresponsive_since"):
        fields.append(("Silent:", f"its guest has not answered since {since} UTC"))
    if ended := vm.get("ended"):
        fields.append(("Ended:", ended))
    lines = [f"{label:<9}{printable(str(value))}" for label, value in fields]
    show(vm, "\n".join([*lines, *lacking_lines(vm)]), brief=vm["name"])


def _shown_state(vm: VmInfo) -> str:
    return f"{vm['state']} (silent)" if vm.get("responding") is False else vm["state"]


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
