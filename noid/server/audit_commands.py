"""``noid-server audit``: who did what, from the log that only ever grows."""

from __future__ import annotations

import dataclasses
import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from noid.server.command import config_and_plugins, config_options, examples, run
from noid.server.token_commands import Span

if TYPE_CHECKING:
    from noid.core.people.audit import AuditEntry

LOOK_SECS = 0.5
_DAY = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d)?)?")


class Since(click.ParamType[datetime]):
    """A day or a moment in UTC, or how long ago."""

    name = "when"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """Return *value* as a moment."""
        if isinstance(value, datetime):
            return value
        text = str(value).strip()
        if _DAY.fullmatch(text):
            try:
                return datetime.fromisoformat(text).replace(tzinfo=UTC)
            except ValueError:
                self.fail(f"{text!r} is no date.", param, ctx)
        try:
            ago: timedelta = Span().convert(text, param, ctx)
        except click.BadParameter:
            self.fail(f"{text!r} is no moment. Write it as 2026-01-02, 2026-01-02T03:04 or 12h.", param, ctx)
        return datetime.now(UTC) - ago


@click.command(
    epilog=examples(
        "noid-server audit -n 50",
        "noid-server audit --user alice --since 2026-01-02",
        "noid-server audit --since 12h --json",
        "noid-server audit -f",
    )
)
@config_options
@click.option("--user", metavar="NAME", help="Only what this user did.")
@click.option("--since", type=Since(), metavar="WHEN", help="2026-01-02, 2026-01-02T03:04 (UTC), or 12h for that ago.")
@click.option("-n", "--lines", type=click.IntRange(0), metavar="N", help="Only the last N.")
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until Ctrl+C.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
def audit(
    config_path: Path | None,
    data_dir: Path | None,
    user: str | None,
    since: datetime | None,
    lines: int | None,
    follow: bool,
    as_json: bool,
) -> None:
    """Show who changed what, and who was not let in, oldest first.

    TIMES is how many equal refusals a line stands for.
    """
    import trio

    from noid.core.database.store import open_store
    from noid.core.people.audit import entries, last_seq

    async def job() -> None:
        config, _ = config_and_plugins(config_path, data_dir)
        with open_store(config.database) as store:
            seen = last_seq(store)
            found = entries(store, user=user, since=since, last=lines)
            if not as_json:
                click.echo(_line("TIME (UTC)", "USER", "TOKEN", "FROM", "STATUS", "TIMES", "ACTION"))
            while True:
                for entry in found:
                    click.echo(json.dumps(_fields(entry)) if as_json else _shown(entry))
                if not follow:
                    return
                seen = max([seen, *(entry.seq for entry in found)])
                while not (found := entries(store, after=seen, user=user)):  # noqa: ASYNC110  # SQLite tells nobody
                    await trio.sleep(LOOK_SECS)

    run(job)


def _shown(entry: AuditEntry) -> str:
    return _line(
        entry.at.strftime("%Y-%m-%d %H:%M:%S"),
        entry.user or "-",
        entry.token or "-",
        entry.address,
        "-" if entry.status is None else "done" if entry.status == 0 else str(entry.status),
        str(entry.count),
        f"{entry.action} {entry.target}".rstrip(),
    )


def _line(at: str, user: str, token: str, address: str, status: str, count: str, action: str) -> str:
    return f"{at:<19} {user:<16} {token:<12} {address:<15} {status:<6} {count:>5} {action}"


def _fields(entry: AuditEntry) -> dict[str, Any]:
    return dataclasses.asdict(entry) | {"at": entry.at.isoformat()}
