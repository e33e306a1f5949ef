"""``noid operations``, ``quota``: what the server does and did for one, and what one may have of it."""

from __future__ import annotations

import click

from noid.cli.options import call, command
from noid.cli.output import printable, show, table
from noid.client.answers import OperationInfo
from noid.client.calls import account
from noid.client.calls import operations as calls

STATES = ("running", "succeeded", "failed", "cancelled")
LIMIT = 50
LIMIT_MAX = 1000


@command(
    examples="""
noid operations --state running
noid operations 019a6f3e-7c1f-7d7e-a1a7-2f6d8f1f6a11
noid operations 019a6f3e-7c1f-7d7e-a1a7-2f6d8f1f6a11 --cancel
""",
)
@click.argument("operation", required=False)
@click.option("--vm", metavar="NAME", help="Only those of this VM.")
@click.option("--state", type=click.Choice(STATES), help="Only those in this state.")
@click.option(
    "--limit", type=click.IntRange(1, LIMIT_MAX), default=LIMIT, show_default=True, metavar="N", help="At most so many."
)
@click.option("--cancel", is_flag=True, help="Have undone what it has begun.")
def operations(operation: str | None, vm: str | None, state: str | None, limit: int, cancel: bool) -> None:
    """Show what the server does and has done to your VMs within 24 hours, newest first; or one of them, in full."""
    if operation is None:
        if cancel:
            raise click.UsageError("--cancel needs to know which one: noid operations OPERATION --cancel")
        found = call().perform(calls.every(vm=vm, state=state, limit=limit))
        rows = [_row(each) for each in found]
        text = table(("operation", "kind", "vm", "state", "step", "started"), rows) if rows else "No operations found."
        show(found, text, brief="\n".join(each["id"] for each in found))
        return
    one = call().perform(calls.cancel(operation) if cancel else calls.get(operation))
    lines = [f"{name + ':':<11}{printable(value)}" for name, value in _fields(one) if value]
    show(one, "\n".join(lines), brief=one["id"])


def _row(one: OperationInfo) -> list[str]:
    return [one["id"], one["kind"], one["vm"], one["state"], one["step"] or "", _shown_time(one["started_at"])]


def _fields(one: OperationInfo) -> list[tuple[str, str]]:
    error = one.get("error") or {}
    timings = ", ".join(f"{phase} {secs * 1000:.0f} ms" for phase, secs in one.get("timings", {}).items())
    return [
        ("Operation", one["id"]),
        ("Kind", one["kind"]),
        ("VM", one["vm"]),
        ("State", one["state"]),
        ("Step", one["step"] or ""),
        ("Started", _shown_time(one["started_at"])),
        ("Ended", _shown_time(one["ended_at"])),
        ("Phases", timings),
        ("Error", str(error.get("error", ""))),
    ]


def _shown_time(text: str | None) -> str:
    return (text or "")[:19].replace("T", " ")


@command(examples="noid quota")
def quota() -> None:
    """Show what you may have of each resource, and have."""
    found = call().perform(account.quota())
    rows = [
        [resource, str(use), "-" if found["limits"].get(resource) is None else str(found["limits"][resource])]
        for resource, use in found["use"].items()
    ]
    show(found, table(("resource", "used", "limit"), rows))
