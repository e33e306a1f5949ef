"""``noid logs``: what a VM's console, or one of its processes, has printed."""

from __future__ import annotations

import click

from noid.cli.options import call, command, resolved_vm, with_name_option
from noid.cli.output import show
from noid.cli.streams import write
from noid.client import log_stream

END_OFFSET = 1 << 59  # beyond every end, which is where reading then begins: minus 0 would be the beginning
INTERRUPTED = 130


@command(
    examples="""
noid logs web
noid logs web --follow
noid logs web --tail 2000
""",
)
@click.argument("name", required=False)
@click.argument("log", default="console", metavar="[LOG]")
@with_name_option
@click.option("-f", "--follow", is_flag=True, help="Go on until it can grow no more, or Ctrl+C.")
@click.option("--tail", type=click.IntRange(min=0), metavar="BYTES", help="Begin that far from its end.")
def logs(name: str | None, log: str, name_option: str | None, follow: bool, tail: int | None) -> int:
    """Print what a VM's console, or the process LOG, has shown.

    A console's log begins with the machine: a clone's with the clone. Of a long one the middle is no longer kept;
    where that is the case, stderr says so.
    """
    vm = resolved_vm(name, name_option)
    texts: list[bytes] = []
    gaps: list[dict[str, int]] = []
    as_json = call().json

    def on_output(channel: int, data: bytes) -> None:
        texts.append(data) if as_json else write(channel, data)

    def on_gap(start: int, end: int) -> None:
        gaps.append({"start": start, "end": end})
        if not as_json:
            click.echo(f"\n[{end - start} bytes are no longer kept]", err=True)

    offset = 0 if tail is None else -tail if tail else END_OFFSET
    try:
        start, end = log_stream.read(
            call().endpoint,
            vm,
            log,
            offset=offset,
            follow=follow,
            on_output=on_output,
            on_gap=on_gap,
        )
    except KeyboardInterrupt:
        return INTERRUPTED
    if as_json:
        text = b"".join(texts).decode("utf-8", "replace")
        show({"log": log, "start": start, "end": end, "gaps": gaps, "text": text}, "")
    return 0
