"""How results look: tables and lines as the predecessor printed them, or JSON; and progress, on a terminal only."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click

from noid.cli import colours
from noid.cli.options import call

PROGRESS_AFTER_SECS = 1.0


def show(value: object, text: str, *, brief: str = "") -> None:
    """Print *text*; with ``--quiet`` *brief*, the names a script goes on with; with ``--json`` *value* as one line.

    JSON's non-ASCII is escaped: every pipe can carry that. No line is printed for no text.
    """
    invocation = call()
    printed = json.dumps(value) if invocation.json else brief if invocation.quiet else text
    if printed:
        click.echo(printed, color=colours.wanted(sys.stdout))


def show_timing(answer: object) -> None:
    """Print on stderr how long each phase of the work behind *answer* took on the server, as far as it says so."""
    timings = answer.get("timings") if isinstance(answer, dict) else None
    if not timings:
        click.echo("Timing: the server says nothing of this.", err=True)
        return
    width = max(map(len, timings))
    for phase, seconds in timings.items():
        click.echo(f"{printable(phase):<{width}}  {seconds * 1000:9.1f} ms", err=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an ASCII grid with a rule above and below every row, as scripts written for the predecessor expect."""
    lines = [[printable(cell) for cell in row] for row in (header, *rows)]
    widths = [max(_columns(cell) for cell in column) for column in zip(*lines, strict=True)]
    rule = "+" + "+".join("-" * (width + 2) for width in widths) + "+"
    grid = [rule]
    for line in lines:
        cells = (f" {cell}{' ' * (width - _columns(cell))} " for cell, width in zip(line, widths, strict=True))
        grid += [f"|{'|'.join(cells)}|", rule]
    return "\n".join(grid)


def printable(text: str) -> str:
    """Return *text* with everything escaped that could move a cursor or break a line: labels come from anybody."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _columns(text: str) -> int:
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Show *what* and the seconds so far on stderr, one line, gone at the end; nothing unless stderr is a terminal."""
    if sys.stderr is None or not sys.stderr.isatty() or call().quiet:
        yield
        return
    import threading

    ended = threading.Event()
    began = time.monotonic()

    def show() -> None:
        while not ended.wait(PROGRESS_AFTER_SECS):
            sys.stderr.write(f"\r{what} ... {time.monotonic() - began:.0f} s\x1b[K")
            sys.stderr.flush()

    ticker = threading.Thread(target=show, daemon=True)
    ticker.start()
    try:
        yield
    finally:
        ended.set()
        ticker.join()
        if time.monotonic() - began >= PROGRESS_AFTER_SECS:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
