"""``noid fork``: copies of a running VM, all woken at one instant of it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator

import click

from noid.cli.finishing import Work, one_interruption
from noid.cli.friendly_names import is_taken
from noid.cli.labels import given
from noid.cli.options import Call, call, chosen_name, command, resolved_vm, with_labels, with_name_option
from noid.cli.output import progress, say, show
from noid.cli.receipts import lacking_lines
from noid.client.answers import CheckpointInfo, VmInfo
from noid.client.calls import checkpoints, vms
from noid.client.errors import ServerError, ServerTooOld
from noid.client.settings import active_vm
from noid.core.model.names import NAME_LENGTH_MAX, checked_name
from noid.errors import NoidError

LABEL = "noid.fork"
FORKS_MAX = 1000
AT_ONCE = 8
FAILURES_SHOWN = 5
FINISH_SECS = 60.0


class Forks:
    """The copies that are wanted of one checkpoint, made several at a time."""

    def __init__(self, invocation: Call, checkpoint: CheckpointInfo, names: _Names, labels: dict[str, str]) -> None:
        self.made: list[VmInfo] = []
        self.failures: list[NoidError] = []
        self._invocation = invocation
        self._checkpoint = checkpoint
        self._names = names
        self._labels = labels
        self._left = self._under_way = 0
        self._changed = threading.Condition()

    def make(self, count: int) -> None:
        """Make *count* of them. Each that fails is among the *failures*, and keeps none of the others from it."""
        self._left = count
        for worker in [Work(self._work) for _ in range(min(count, AT_ONCE))]:
            worker.result()

    def finish(self) -> None:
        """Begin no more of them, and wait for those that were begun, for `FINISH_SECS` at most."""
        with self._changed:
            self._left = 0
            self._changed.wait_for(lambda: not self._under_way, FINISH_SECS)

    def _work(self) -> None:
        while self._takes_one():
            try:
                vm = self._make_one()
            except NoidError as error:
                self.failures.append(error)
            else:
                self.made.append(vm)
            finally:
                with self._changed:
                    self._under_way -= 1
                    self._changed.notify_all()

    def _takes_one(self) -> bool:
        with self._changed:
            if not self._left:
                return False
            self._left -= 1
            self._under_way += 1
            return True

    def _make_one(self) -> VmInfo:
        source, id_ = self._checkpoint["vm_name"], self._checkpoint["id"]
        while True:
            name = self._names.next()
            try:
                return self._invocation.perform(checkpoints.restore(source, id_, name, labels=self._labels))
            except ServerError as error:
                if not (is_taken(error) and self._names.has_more):
                    raise ServerError(f"VM {name!r}: {error}", status=0, code=error.code) from error


class _Names:
    """What the copies are called: *base* alone, or *base* and numbers from 1 on that nobody has."""

    def __init__(self, base: str, *, numbered: bool, taken: set[str]) -> None:
        self.has_more = numbered
        self._lock = threading.Lock()
        self._names = (name for name in _numbered(base) if name not in taken) if numbered else iter((base,))

    def next(self) -> str:
        with self._lock:
            return next(self._names)


def _numbered(base: str) -> Iterator[str]:
    number = 0
    while True:
        number += 1
        yield f"{base[: NAME_LENGTH_MAX - len(str(number)) - 1]}-{number}"


@command(
    examples="""
noid fork web                  web-1, or the next number that is free
noid fork web 5 --as worker    worker-1 to worker-5
noid fork web --as copy
""",
)
@click.argument("words", nargs=-1, metavar="[NAME] [N]")
@with_name_option
@click.option("--as", "new_name", metavar="NEW_NAME", help="What one copy, or before its number each, is called.")
@with_labels("A word of yours on each copy; may be repeated.")
@click.option("--keep-checkpoint", is_flag=True, help="Leave the checkpoint that they were made from.")
def fork(
    words: tuple[str, ...],
    name_option: str | None,
    new_name: str | None,
    labels: tuple[str, ...],
    keep_checkpoint: bool,
) -> int:
    """Make N copies of a running VM, which goes on running.

    All continue from the same instant: the VM is frozen once, and the checkpoint is removed afterwards.
    """
    source, count = _read(words, name_option)
    if new_name is not None:
        checked_name(new_name, "new VM name")
    wanted = given(labels)
    invocation = call()
    numbered = new_name is None or count > 1
    taken = {vm["name"] for vm in invocation.perform(vms.every())} if numbered else set()
    names = _Names(new_name or source, numbered=numbered, taken=taken)
    with _frozen(source, kept=keep_checkpoint) as (checkpoint, finishing):
        forks = Forks(invocation, checkpoint, names, wanted)
        try:
            with progress(f"Forking VM {source!r}" if count == 1 else f"Forking VM {source!r} {count} times"):
                forks.make(count)
        finally:
            finishing()
            forks.finish()
            _show(forks, source, checkpoint if keep_checkpoint else None)
    return 1 if forks.failures else 0


def _read(words: tuple[str, ...], name_option: str | None) -> tuple[str, int]:
    """Return the VM and the number of copies that ``[NAME] [N]`` means. A number alone is one where a VM is chosen."""
    if len(words) > 2:
        raise click.UsageError("give the VM, and how many copies: noid fork web 3")
    number = words[1] if len(words) == 2 else None
    named = words[0] if words else None
    if len(words) == 1 and words[0].isdecimal() and (name_option is not None or active_vm() is not None):
        named, number = None, words[0]
    source = resolved_vm(chosen_name(named, name_option), None)
    if number is None:
        return source, 1
    if not (number.isascii() and number.isdecimal() and len(number) <= 9 and 1 <= int(number) <= FORKS_MAX):
        raise click.UsageError(f"{number[:40]!r} is no number of copies. It goes from 1 to {FORKS_MAX}.")
    return source, int(number)


@contextlib.contextmanager
def _frozen(source: str, *, kept: bool) -> Iterator[tuple[CheckpointInfo, Callable[[], None]]]:
    """Take a checkpoint of *source* for the block, and remove it afterwards, unless it is *kept*.

    A checkpoint that is not taken yet when somebody interrupts is waited for: it would be left otherwise. The block may
    be interrupted once, as by `one_interruption`, and gets what to call before it finishes what it has begun.
    """
    invocation = call()
    labels = {} if kept else {LABEL: os.urandom(8).hex()}
    with one_interruption("Finishing what was begun; Ctrl+C again leaves it as it is.") as finishing:
        taking = Work(lambda: invocation.perform(checkpoints.take(source, labels=labels)))
        try:
            with progress(f"Checkpointing VM {source!r}"):
                checkpoint = taking.result()
            yield checkpoint, finishing
        finally:
            finishing()
            if not kept and taking.has_ended(FINISH_SECS) and taking.failure is None:
                _remove(invocation, taking.result())


def _remove(invocation: Call, checkpoint: CheckpointInfo) -> None:
    try:
        invocation.perform(checkpoints.remove(checkpoint["vm_name"], checkpoint["id"]))
    except ServerTooOld as error:
        with contextlib.suppress(OSError):
            say(f"warning: checkpoint {checkpoint['id']} stays: {error}")
    except NoidError as error:
        with contextlib.suppress(OSError):
            say(
                f"warning: checkpoint {checkpoint['id']} is left: {str(error).rstrip('.')}. Remove it with: noid rm "
                f"{checkpoint['id']}"
            )


def _show(forks: Forks, source: str, checkpoint: CheckpointInfo | None) -> None:
    """Print what was made, and on stderr what was not."""
    made = sorted(forks.made, key=lambda vm: (len(vm["name"]), vm["name"]))
    lines = [line for vm in made for line in (f"VM '{vm['name']}' forked from '{source}'", *lacking_lines(vm))]
    if checkpoint is not None:
        lines.append(f"Checkpoint '{checkpoint['id']}' kept")
    failed = list(map(str, forks.failures))
    value = {"source": source, "vms": made, "failed": failed, "checkpoint": checkpoint}
    show(value, "\n".join(lines), brief="\n".join(vm["name"] for vm in made))
    for text in failed[:FAILURES_SHOWN]:
        say(f"Error: {text}")
    if len(failed) > FAILURES_SHOWN:
        click.echo(f"Error: {len(failed) - FAILURES_SHOWN} more could not be made.", err=True)
