"""``noid events``: what happens, as it happens."""

from __future__ import annotations

import json
import re
import sys
from datetime import UTC, datetime, timedelta

import click

from noid.cli.options import call, command
from noid.cli.output import printable, say
from noid.client.errors import ConnectionFailed, ServerError
from noid.client.event_stream import GAP, Event, EventStream
from noid.client.link import Link
from noid.client.waiting import Blocking, finished
from noid.core.model.names import checked_name

INTERRUPTED = 130
EVERYTHING = "0"
"""The id of no event: behind it comes all that is kept."""
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_AGO = re.compile(r"([0-9]{1,9})([smhd])", re.ASCII)


@command(
    examples="""
noid events
noid events --vm web --kind vm.died --json
noid events --since 10m --no-follow
""",
)
@click.option("--vm", metavar="NAME", help="Only what happens to this VM.")
@click.option("--kind", "kinds", multiple=True, metavar="KIND", help="Only this, as vm.create; may be repeated.")
@click.option("--since", metavar="AGO|ID", help="From 30s, 10m, 2h ago, or behind an event.")
@click.option("--follow/--no-follow", "-f", default=True, help="Go on until Ctrl+C; else end with what has happened.")
def events(vm: str | None, kinds: tuple[str, ...], since: str | None, follow: bool) -> int:
    """Show what happens to your VMs. A lost connection is made again, and nothing is missed.

    The server keeps the latest 1000 events until it ends; where some are missing, stderr says so. --json prints one
    object a line, -q the ids, for --since.
    """
    if vm is not None:
        checked_name(vm)
    after, oldest = _since(since)
    link = Link(call().endpoint, Blocking())
    stream = EventStream(link, vm=vm, kinds=kinds, after=after, follow=follow, on_lost=_tell_lost)
    try:
        expected = oldest is not None  # so far back, what is no longer kept is no news
        while (event := finished(stream.next())) is not None:
            if event.kind == GAP:
                if not expected:
                    _tell_gap(event)
                expected = False
            elif oldest is None or _time(event) >= oldest:
                _show(event)
    except KeyboardInterrupt:
        return INTERRUPTED  # how one ends it
    finally:
        stream.close()
    return 0


def _since(text: str | None) -> tuple[str | None, datetime | None]:
    """Return behind which event to begin, and from which time on what came is wanted."""
    if text is None:
        return None, None
    if (ago := _AGO.fullmatch(text)) is not None:
        return EVERYTHING, datetime.now(UTC) - timedelta(seconds=int(ago[1]) * _UNITS[ago[2]])
    if "-" not in text or not text.isascii() or not text.isprintable() or " " in text:
        raise click.UsageError(f"{printable(text)!r} is neither a time such as 30s, 10m, 2h, 1d nor an event's id.")
    return text, None


def _time(event: Event) -> datetime:
    try:
        at = datetime.fromisoformat(event.at or "")
    except ValueError:
        return datetime.max.replace(tzinfo=UTC)  # nobody knows: rather shown than missed
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def _show(event: Event) -> None:
    invocation = call()
    if invocation.json:
        line = json.dumps(_fields(event))
    elif invocation.quiet:
        line = event.id
    else:
        facts = " ".join(f"{key}={_plain(value)}" for key, value in event.facts.items() if _is_plain(value))
        line = printable(f"{(event.at or '')[:19].replace('T', ' ')}  {event.kind:<16} {event.vm or '-'}  {facts}")
    click.echo(line.rstrip())
    sys.stdout.flush()


def _fields(event: Event) -> dict[str, object]:
    return {"id": event.id, "kind": event.kind, "vm": event.vm, "at": event.at, "facts": event.facts}


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float)


def _plain(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _tell_gap(event: Event) -> None:
    if call().json:
        click.echo(json.dumps(_fields(event)))
    click.echo("Some events are missing here: they are no longer kept. See what there is with: noid list", err=True)


def _tell_lost(error: ConnectionFailed | ServerError) -> None:
    if not call().quiet:
        say(f"{error} Trying again, from where this was.")
