"""What a VM that a command makes shall be: of a shape and an image, or woken from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import click
from click.core import ParameterSource

from noid.cli.checkpoint_choice import Checkpoints, Chosen
from noid.cli.options import CommandT
from noid.client.answers import VmInfo
from noid.client.calls import checkpoints, vms
from noid.client.calls.call import Call

DEFAULT_CPUS = 1
DEFAULT_MEM_MIB = 2048
_SHAPE = ("cpus", "mem", "image")


def with_shape(command: CommandT) -> CommandT:
    """Add the options that say what a new VM shall be. The command gets *cpus*, *mem*, *image* and *checkpoint*."""
    for option in (
        click.option("--from", "checkpoint", metavar="CHECKPOINT", help="Wake it from this checkpoint: id or label."),
        click.option("--image", metavar="IMAGE", help="What it boots; the server's default if not given."),
        click.option("--mem", type=int, default=DEFAULT_MEM_MIB, show_default=True, metavar="MIB", help="Memory."),
        click.option("--cpus", type=int, default=DEFAULT_CPUS, show_default=True, metavar="N", help="Virtual CPUs."),
    ):
        command = option(command)
    return command


@dataclass(frozen=True, slots=True, kw_only=True)
class NewVm:
    """A VM to be made. One that wakes from *checkpoint* has the shape and the image of that."""

    cpus: int
    mem_mib: int
    image: str | None
    checkpoint: Chosen | None
    labels: dict[str, str] = field(default_factory=dict)

    @classmethod
    def asked(
        cls,
        *,
        cpus: int,
        mem_mib: int,
        image: str | None,
        checkpoint: str | None,
        labels: Mapping[str, str] | None = None,
    ) -> NewVm:
        """Return what the options of the command that is running mean. A *checkpoint* may have to be looked for.

        Raises:
            click.UsageError: they contradict each other.
            NotFound, InvalidRequest: no checkpoint, or more than one, is meant.
        """
        chosen = None
        if checkpoint is not None:
            context = click.get_current_context()
            said = [f"--{name}" for name in _SHAPE if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
            if said:
                raise click.UsageError(f"with --from, the checkpoint says what the VM is: not with {', '.join(said)}.")
            chosen = Checkpoints().meant(checkpoint, None)
        return cls(cpus=cpus, mem_mib=mem_mib, image=image, checkpoint=chosen, labels=dict(labels or {}))

    def request(self, name: str) -> Call[VmInfo]:
        """Return what makes it, called *name*."""
        if self.checkpoint is not None:
            return checkpoints.restore(self.checkpoint.vm, self.checkpoint.id, name, labels=self.labels)
        return vms.create(name, cpus=self.cpus, mem_mib=self.mem_mib, image=self.image, labels=self.labels)
