"""``noid ps``, ``attach``, ``kill``: the processes of a VM, which run on without us."""

from __future__ import annotations

import os

import click

from noid.cli import terminal
from noid.cli.exec import FAILED, INTERRUPTED, exit_code, tell_gap
from noid.cli.options import call, command, resolved_vm, with_name_option, with_vm
from noid.cli.output import show, table
from noid.cli.streams import write
from noid.client import exec_stream
from noid.client.calls import processes
from noid.client.terminal import Terminal

ARGV_CHARACTERS = 60


@command(examples="noid ps web")
@with_vm
def ps(name: str | None, name_option: str | None) -> None:
    """Show a VM's processes that noid started, ended ones too."""
    found = call().perform(processes.every(resolved_vm(name, name_option)))
    header = ("process", "pid", "state", "exit", "origin", "started", "command")
    rows = [
        [
            process["id"],
            str(process["pid"]),
            process["state"],
            "" if process["exit_code"] is None else str(process["exit_code"]),
            process["origin"],
            (process["started_at"] or "")[:19].replace("T", " "),
            " ".join(process["command"])[:ARGV_CHARACTERS],
        ]
        for process in found
    ]
    brief = "\n".join(process["id"] for process in found)
    show(found, table(header, rows) if rows else "No processes found.", brief=brief)


def vm_and_process(words: tuple[str, ...], name_option: str | None) -> tuple[str, str]:
    """Return the two words of ``[NAME] PROCESS``."""
    if not 1 <= len(words) <= 2:
        raise click.UsageError("give the VM and the process, or the process alone where a VM is chosen.")
    return resolved_vm(words[0] if len(words) == 2 else None, name_option), words[-1]


@command(examples="noid attach web 8f0a12bc")
@click.argument("words", nargs=-1, metavar="[NAME] PROCESS")
@with_name_option
@click.option("-i", "--interactive", is_flag=True, help="Forward standard input, if the process takes any.")
@click.option("-t", "--tty", is_flag=True, help="Be its terminal; implies -i.")
@terminal.with_detach_keys("ctrl-p,ctrl-q", help_text="What leaves it running, with -t.")
@click.option("--from-start", is_flag=True, help="Say so when the beginning of its output is gone.")
def attach(
    words: tuple[str, ...], name_option: str | None, interactive: bool, tty: bool, keys: bytes, from_start: bool
) -> int:
    """Show what a process has written and writes, until it ends. Its exit code is ours; Ctrl+C leaves it alone."""
    call().fails_with = FAILED
    vm, process = vm_and_process(words, name_option)
    if tty and not os.isatty(terminal.STDIN_FD):
        raise click.UsageError("-t needs a terminal, and standard input is none.")
    try:
        with terminal.raw(tty) as wakeup_fd:
            conversation = exec_stream.Conversation(
                on_output=write,
                on_gap=tell_gap,
                stdin_fd=terminal.STDIN_FD if interactive or tty else None,
                terminal=Terminal(size=terminal.size, wakeup_fd=wakeup_fd, keys=keys) if tty else None,
            )
            result = exec_stream.attach(call().endpoint, vm, process, conversation, from_start=from_start)
    except KeyboardInterrupt:
        return INTERRUPTED
    if result is None:
        click.echo("Detached; it runs on.", err=True)
        return 0
    return exit_code(result, vm)


@command(
    examples="""
noid kill web 8f0a12bc
noid kill web 8f0a12bc -s INT
noid kill web 8f0a12bc --forget
""",
)
@click.argument("words", nargs=-1, metavar="[NAME] PROCESS")
@with_name_option
@click.option(
    "-s", "--signal", "signal_name", default="TERM", show_default=True, metavar="SIGNAL", help="Name or number."
)
@click.option("--forget", is_flag=True, help="End it (TERM, then KILL), and remove it and its output.")
def kill(words: tuple[str, ...], name_option: str | None, signal_name: str, forget: bool) -> None:
    """Send a signal to a process and all it has started."""
    vm, process = vm_and_process(words, name_option)
    if forget:
        call().perform(processes.end(vm, process))
        show({"process": process, "forgotten": True}, f"Process {process} is gone", brief=process)
        return
    signal = int(signal_name) if signal_name.isdecimal() else signal_name
    call().perform(processes.send_signal(vm, process, signal))
    show({"process": process, "signal": signal_name}, f"Process {process} was sent {signal_name}", brief=process)
