"""``noid label``, and ``--label KEY=VALUE`` of other commands: their owner's words on VMs and checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import click

from noid.cli.options import call, command, resolved_vm, with_name_option
from noid.cli.output import printable, show
from noid.client.answers import CheckpointInfo, VmInfo
from noid.client.calls import checkpoints, vms
from noid.errors import NoidError

LabelledT = TypeVar("LabelledT", VmInfo, CheckpointInfo)


def given(texts: Sequence[str]) -> dict[str, str]:
    """Return the labels that *texts*, ``KEY=VALUE`` each, stand for. The last of two with one key wins.

    Raises:
        click.UsageError: one is something else.
        InvalidRequest: no thing can have them.
    """
    from noid.core.model.names import checked_labels

    labels = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise click.UsageError(f"{text!r} is no label. Write KEY=VALUE.")
        labels[key] = value
    return checked_labels(labels)


def labelled(things: list[LabelledT]) -> list[LabelledT]:
    """Return *things*, which the server was asked to choose by their labels.

    Raises:
        NoidError: it has not: it knows of no labels, and these are all there are.
    """
    if any("labels" not in thing for thing in things):
        raise NoidError("this server keeps no labels, so it cannot choose by them. Nothing was shown.")
    return things


def warn_unless_kept(wanted: dict[str, str], thing: VmInfo | CheckpointInfo) -> None:
    """Say on stderr that the server has made *thing* without the labels that were *wanted*, if so."""
    if wanted and "labels" not in thing:
        click.echo("warning: this server keeps no labels; it was made without them.", err=True)


@command(
    examples="""
noid label web                        show them
noid label web tier=front team=infra  set two
noid label web team-                  remove one
noid label web --checkpoint 0123456789abcdef keep=yes
""",
)
@click.argument("words", nargs=-1, metavar="[NAME] [KEY=VALUE | KEY-]...")
@with_name_option
@click.option("--checkpoint", metavar="CHECKPOINT", help="Label this checkpoint: its id, a beginning of it, its label.")
def label(words: tuple[str, ...], name_option: str | None, checkpoint: str | None) -> None:
    """Set, remove or show the labels of a VM or a checkpoint.

    The first word is the VM if it neither has a '=' nor ends with '-'. `noid list --label KEY=VALUE` chooses by them.
    """
    named, changes = _read(words)
    patch = _patch(changes)
    thing: VmInfo | CheckpointInfo
    if checkpoint is None:
        vm = resolved_vm(named, name_option)
        thing = call().perform(vms.label(vm, patch) if patch else vms.get(vm))
    else:
        from noid.cli.checkpoint_choice import Checkpoints
        from noid.cli.options import chosen_name

        found = Checkpoints().meant(checkpoint, chosen_name(named, name_option))
        request = checkpoints.label(found.vm, found.id, patch) if patch else checkpoints.get(found.vm, found.id)
        thing = call().perform(request)
    if "labels" not in thing:
        raise NoidError("this server keeps no labels. Nothing was changed.")
    lines = [printable(f"{key}={value}") for key, value in thing["labels"].items()]
    show(thing, "\n".join(lines) or "No labels.", brief="\n".join(lines))


def _read(words: tuple[str, ...]) -> tuple[str | None, tuple[str, ...]]:
    """Return the VM that is named, if one is, and what shall be changed."""
    if words and "=" not in words[0] and not words[0].endswith("-"):
        return words[0], words[1:]
    return None, words


def _patch(changes: tuple[str, ...]) -> dict[str, str | None]:
    patch: dict[str, str | None] = {}
    for word in changes:
        if "=" not in word and word.endswith("-"):
            patch[word[:-1]] = None
        else:
            patch |= given([word])
    return patch
