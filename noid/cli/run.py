"""``noid run``: one command in a VM of its own, which is gone afterwards."""

from __future__ import annotations

import click

from noid.cli.exec import AfterDashes, ExecOptions, execute, guest_command, requested, with_exec_options
from noid.cli.new_vm import NewVm, with_shape
from noid.cli.options import chosen_name, command
from noid.cli.throwaway import throwaway_vm


@command(
    cls=AfterDashes,
    examples="""
noid run -it --from golden -- bash
""",
)
@click.option("--name", "name", metavar="NAME", help="What to call the VM.")
@with_shape
@click.option("--keep", is_flag=True, help="Leave the VM there.")
@with_exec_options
def run(
    name: str | None,
    cpus: int,
    mem: int,
    image: str | None,
    checkpoint: str | None,
    keep: bool,
    options: ExecOptions,
) -> int:
    """Run a command in a new VM, which is gone afterwards. Otherwise as exec."""
    argv = guest_command()
    if not argv:
        raise click.UsageError("no command. Write it after two dashes: noid run -- uname -a")
    name = chosen_name(name, None)
    request = requested(argv, options)
    new = NewVm.asked(cpus=cpus, mem_mib=mem, image=image, checkpoint=checkpoint)
    with throwaway_vm(new, name, kept=keep) as vm:
        return execute(vm.name, request, options, on_detach=vm.keep)
