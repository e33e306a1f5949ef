"""``noid stop``, ``start``, ``reboot``, ``pause``, ``resume``: whether a VM runs.

Each takes any number of VMs, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable

import click

from noid.cli.options import CommandT, call, command, for_each, resolved_vms, with_vms
from noid.cli.output import printable, show
from noid.client.answers import VmInfo
from noid.client.calls import vms

GRACE_SECS = 30.0


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


@command(examples="noid stop web\nnoid stop web db --timeout 120")
@with_vms
@_with_grace
def stop(names: tuple[str, ...], name_option: str | None, grace_secs: float, force: bool) -> None:
    """Shut a VM down. Its disk stays; what it had in memory is lost.

    The guest is asked to shut down in order. If it has not within --timeout, its machine is ended all the same.
    """

    def act(name: str) -> tuple[VmInfo, str]:
        vm = call().perform(vms.stop(name, grace_secs=grace_secs, force=force), f"Stopping VM {name!r}")
        return vm, f"VM '{name}' is {vm['state']} ({printable(vm.get('how') or 'not running')})"

    _each(names, name_option, act)


@command(examples="noid start web")
@with_vms
def start(names: tuple[str, ...], name_option: str | None) -> None:
    """Boot a stopped or dead VM on its disk.

    Returns when it has booted.
    """

    def act(name: str) -> tuple[VmInfo, str]:
        vm = call().perform(vms.start(name), f"Starting VM {name!r}")
        return vm, f"VM '{name}' is {vm['state']}"

    _each(names, name_option, act)


@command(examples="noid reboot web")
@with_vms
@_with_grace
def reboot(names: tuple[str, ...], name_option: str | None, grace_secs: float, force: bool) -> None:
    """Shut a VM down and boot it again on its disk."""

    def act(name: str) -> tuple[VmInfo, str]:
        vm = call().perform(vms.reboot(name, grace_secs=grace_secs, force=force), f"Rebooting VM {name!r}")
        return vm, f"VM '{name}' rebooted ({printable(vm.get('how') or 'started')})"

    _each(names, name_option, act)


@command(examples="noid pause web")
@with_vms
def pause(names: tuple[str, ...], name_option: str | None) -> None:
    """Make a VM's CPUs stand still. Its memory stays, and so does its place on the host.

    Its clock stands still too, and is behind afterwards.
    """

    def act(name: str) -> tuple[VmInfo, str]:
        vm = call().perform(vms.pause(name), f"Pausing VM {name!r}")
        return vm, f"VM '{name}' is {vm['state']}"

    _each(names, name_option, act)


@command(examples="noid resume web")
@with_vms
def resume(names: tuple[str, ...], name_option: str | None) -> None:
    """Let a paused VM go on."""

    def act(name: str) -> tuple[VmInfo, str]:
        vm = call().perform(vms.resume(name), f"Resuming VM {name!r}")
        return vm, f"VM '{name}' is {vm['state']}"

    _each(names, name_option, act)


def _each(names: tuple[str, ...], name_option: str | None, act: Callable[[str], tuple[VmInfo, str]]) -> None:
    """Do *act* for every VM that is meant, and show what each has become."""

    def act_and_show(name: str) -> None:
        vm, text = act(name)
        show(vm, text, brief=vm["name"])

    for_each(resolved_vms(names, name_option), act_and_show)
