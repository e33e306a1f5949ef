"""``noid stop``, ``start``, ``reboot``, ``pause``, ``resume``: whether a VM runs.

Each takes any number of VMs, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable

import click

from noid.cli.options import Command, CommandT, call, resolved_vm, with_endpoint, with_json, with_name_option
from noid.cli.output import printable, progress, show
from noid.client import api
from noid.errors import NoidError

GRACE_SECS = 30.0


def _with_vms(command: CommandT) -> CommandT:
    """Add ``[NAME]...`` and ``--name``. The command gets *names* and *name_option*."""
    return click.argument("names", nargs=-1, metavar="[NAME]...")(with_name_option(command))


def _with_grace(command: CommandT) -> CommandT:
    """Add ``--timeout`` and ``--force``. The command gets *grace_secs* and *force*."""
    force = click.option("--force", is_flag=True, help="Do not ask the guest: like pulling the plug.")
    timeout = click.option(
        "--timeout",
        "grace_secs",
        type=click.FloatRange(min=0),
        default=GRACE_SECS,
        show_default=True,
        metavar="SECS",
        help="How long the guest may take to shut down before it is ended.",
    )
    return timeout(force(command))


@click.command(cls=Command, epilog="noid stop web\nnoid stop web db --timeout 120")
@_with_vms
@_with_grace
@with_json
@with_endpoint
def stop(names: tuple[str, ...], name_option: str | None, grace_secs: float, force: bool) -> None:
    """Shut a VM down. Its disk stays; what it had in memory is lost.

    The guest is asked to shut down in order. If it has not within --timeout, its machine is ended all the same.
    """

    def act(name: str) -> tuple[api.VmInfo, str]:
        vm = api.stop_vm(call().endpoint, name, grace_secs=grace_secs, force=force)
        return vm, f"VM '{name}' is {vm['state']} ({printable(vm.get('how') or 'not running')})"

    _each(names, name_option, "Stopping", act)


@click.command(cls=Command, epilog="noid start web")
@_with_vms
@with_json
@with_endpoint
def start(names: tuple[str, ...], name_option: str | None) -> None:
    """Boot a stopped or dead VM on its disk.

    Returns when it has booted.
    """

    def act(name: str) -> tuple[api.VmInfo, str]:
        vm = api.start_vm(call().endpoint, name)
        return vm, f"VM '{name}' is {vm['state']}"

    _each(names, name_option, "Starting", act)


@click.command(cls=Command, epilog="noid reboot web")
@_with_vms
@_with_grace
@with_json
@with_endpoint
def reboot(names: tuple[str, ...], name_option: str | None, grace_secs: float, force: bool) -> None:
    """Shut a VM down and boot it again on its disk."""

    def act(name: str) -> tuple[api.VmInfo, str]:
        vm = api.reboot_vm(call().endpoint, name, grace_secs=grace_secs, force=force)
        return vm, f"VM '{name}' rebooted ({printable(vm.get('how') or 'started')})"

    _each(names, name_option, "Rebooting", act)


@click.command(cls=Command, epilog="noid pause web")
@_with_vms
@with_json
@with_endpoint
def pause(names: tuple[str, ...], name_option: str | None) -> None:
    """Make a VM's CPUs stand still. Its memory stays, and so does its place on the host.

    Its clock stands still too, and is behind afterwards.
    """

    def act(name: str) -> tuple[api.VmInfo, str]:
        vm = api.pause_vm(call().endpoint, name)
        return vm, f"VM '{name}' is {vm['state']}"

    _each(names, name_option, "Pausing", act)


@click.command(cls=Command, epilog="noid resume web")
@_with_vms
@with_json
@with_endpoint
def resume(names: tuple[str, ...], name_option: str | None) -> None:
    """Let a paused VM go on."""

    def act(name: str) -> tuple[api.VmInfo, str]:
        vm = api.resume_vm(call().endpoint, name)
        return vm, f"VM '{name}' is {vm['state']}"

    _each(names, name_option, "Resuming", act)


def _each(
    names: tuple[str, ...], name_option: str | None, doing: str, act: Callable[[str], tuple[api.VmInfo, str]]
) -> None:
    """Do *act* for every VM that is meant. One that fails keeps none of the others from it; the first error counts."""
    if len(names) < 2:
        wanted = [resolved_vm(names[0] if names else None, name_option)]
    elif name_option is None:
        wanted = [resolved_vm(name, None) for name in dict.fromkeys(names)]
    else:
        raise click.UsageError("VMs are named both by --name and as arguments.")
    failed: list[NoidError] = []
    for name in wanted:
        try:
            with progress(f"{doing} VM {name!r}"):
                vm, text = act(name)
            show(vm, text)
        except NoidError as error:
            failed.append(error)
    for other in failed[1:]:
        click.echo(f"Error: {other}", err=True)
    if failed:
        raise failed[0]
