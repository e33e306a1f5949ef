"""``noid logs``: what a VM's console, or one of its processes, has printed."""

from __future__ import annotations

import codecs

import click

from noid.cli.options import call, command, resolved_vm, with_name_option
from noid.cli.output import say, show
from noid.cli.streams import write
from noid.client import log_stream
from noid.core import wire

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
    where that is the case, stderr says so. With --json and -f, an object on a line for all that comes.
    """
    vm = resolved_vm(name, name_option)
    shown = _Lines() if call().json and follow else _Object(log) if call().json else _Text()
    offset = 0 if tail is None else -tail if tail else END_OFFSET
    try:
        start, end = log_stream.read(
            call().endpoint,
            vm,
            log,
            offset=offset,
            follow=follow,
            on_output=shown.output,
            on_gap=shown.gap,
            on_notice=lambda text: say(f"\n[{text}]"),
        )
    except KeyboardInterrupt:
        return INTERRUPTED
    shown.end(start, end)
    return 0


class _Text:
    """Shows a log as it is."""

    def output(self, offset: int, channel: int, data: bytes) -> None:
        """Show *data*."""
        write(channel, data)

    def gap(self, start: int, end: int) -> None:
        """Say that something is missing here."""
        click.echo(f"\n[{end - start} bytes are no longer kept]", err=True)

    def end(self, start: int, end: int) -> None:
        """Nothing more is to be said."""


class _Object(_Text):
    """Shows a log as one object, at its end."""

    def __init__(self, log: str) -> None:
        self._log = log
        self._data = bytearray()
        self._gaps: list[dict[str, int]] = []

    def output(self, offset: int, channel: int, data: bytes) -> None:
        self._data += data

    def gap(self, start: int, end: int) -> None:
        self._gaps.append({"start": start, "end": end})

    def end(self, start: int, end: int) -> None:
        text = self._data.decode("utf-8", "replace")
        show({"log": self._log, "start": start, "end": end, "gaps": self._gaps, "text": text}, "")


class _Lines(_Text):
    """Shows a log as it grows: an object on a line of its own for everything that comes."""

    def __init__(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")
        self._decoders = {channel: decoder("replace") for channel in (wire.STDOUT, wire.STDERR)}

    def output(self, offset: int, channel: int, data: bytes) -> None:
        decoder = self._decoders[channel]
        offset -= len(decoder.getstate()[0])  # a character that was cut is of this object
        text = decoder.decode(data)
        if text:
            show({"offset": offset, "stream": "stderr" if channel == wire.STDERR else "stdout", "text": text}, "")

    def gap(self, start: int, end: int) -> None:
        show({"gap": {"start": start, "end": end}}, "")

    def end(self, start: int, end: int) -> None:
        show({"end": end}, "")
