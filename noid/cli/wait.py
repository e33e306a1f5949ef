"""``noid wait``: until a process has ended, or a VM runs, answers, or has stopped."""

from __future__ import annotations

import time
from collections.abc import Callable

import click

from noid.cli.exec import FAILED, TIMED_OUT, Failed
from noid.cli.options import call, command, resolved_vm, with_name_option
from noid.cli.output import show
from noid.cli.processes import vm_and_process
from noid.client.answers import VmInfo
from noid.client.calls import processes, vms
from noid.client.errors import ServerError

WAIT_SECS = 60.0
ASK_SECS = 1.0
"""How often to ask a server that cannot wait for a change."""
_NOT_YET = frozenset({409, 500, 503, 504})
"""What an exec is refused with while its VM cannot be reached."""


class _TimedOut(click.ClickException):
    exit_code = TIMED_OUT


class _Deadline:
    """When to give up; never where nobody said."""

    def __init__(self, secs: float | None) -> None:
        self._secs = secs
        self._at = None if secs is None else time.monotonic() + secs

    def left(self, at_most: float) -> float:
        """Return for how long to wait next.

        Raises:
            click.ClickException: with 124: it is over.
        """
        if self._at is None:
            return at_most
        left = self._at - time.monotonic()
        if left <= 0:
            raise _TimedOut(f"it did not happen within {self._secs:g} s.")
        return min(left, at_most)


@command(
    examples="""
noid wait web 8f0a12bc
noid wait web --for exec --timeout 60
noid wait web --for stopped
""",
)
@click.argument("words", nargs=-1, metavar="[NAME] [PROCESS]")
@with_name_option
@click.option(
    "--for",
    "state",
    type=click.Choice(list(states := ("running", "exec", "stopped"))),
    help="What the VM shall become.",
)
@click.option("--timeout", "secs", type=click.FloatRange(min=0), metavar="SECS", help="Give up then, with 124.")
def wait(words: tuple[str, ...], name_option: str | None, state: str | None, secs: float | None) -> int:
    """Wait until a process has ended; its exit code is ours. Or until a VM is running, answers commands, or has ended.

    Exit code 125: nobody knows how the process ended, or noid failed.
    """
    call().fails_with = FAILED
    deadline = _Deadline(secs)
    if state is None:
        return _process_ended(*vm_and_process(words, name_option), deadline)
    if len(words) > 1:
        raise click.UsageError("with --for it is a VM that is waited for: noid wait web --for exec")
    vm = resolved_vm(words[0] if words else None, name_option)
    found = {"running": _is_running, "stopped": _has_stopped, "exec": _answers}[state](vm, deadline)
    show(found, f"VM '{found['name']}' " + ("answers" if state == "exec" else f"is {found['state']}"), brief=vm)
    return 0


def _process_ended(vm: str, process: str, deadline: _Deadline) -> int:
    while True:
        found = call().perform(
            processes.wait(vm, process, at_most_secs=deadline.left(WAIT_SECS)), f"Waiting for process {process}"
        )
        if found["state"] != "running":
            break
    if call().json:
        show(found, "")
    if found["exit_code"] is None:
        raise Failed(f"process {process} was lost with its machine; nobody knows how it ended.")
    return found["exit_code"] & 0xFF


def _is_running(vm: str, deadline: _Deadline) -> VmInfo:
    return _changed(vm, deadline, lambda found: found["state"] == "running")


def _has_stopped(vm: str, deadline: _Deadline) -> VmInfo:
    return _changed(vm, deadline, lambda found: found["state"] in ("stopped", "dead"))


def _answers(vm: str, deadline: _Deadline) -> VmInfo:
    """Wait until a command ran in *vm*, whatever became of it: that is what it shall be good for."""
    body = '{"command": ["true"], "timeout_secs": 10}'
    while True:
        found = _is_running(vm, deadline)
        try:
            call().perform(processes.run(vm, body), f"Waiting for VM {vm!r}")
        except ServerError as error:
            if error.status not in _NOT_YET:
                raise
        else:
            return found
        time.sleep(deadline.left(ASK_SECS))


def _changed(vm: str, deadline: _Deadline, is_it: Callable[[VmInfo], bool]) -> VmInfo:
    """Wait until *vm* is what *is_it* says."""
    doing = f"Waiting for VM {vm!r}"
    found = call().perform(vms.get(vm), doing)
    while not is_it(found):
        at_most = deadline.left(WAIT_SECS)
        generation = found.get("generation")
        if generation is None:
            time.sleep(min(at_most, ASK_SECS))
            found = call().perform(vms.get(vm), doing)
        else:
            found = call().perform(vms.changed(vm, after=generation, at_most_secs=at_most), doing)
    return found
