"""How results look: tables and lines as the predecessor printed them, or JSON; and progress, on a terminal only."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TextIO

import click

from noid.cli import colours
from noid.cli.options import call

PROGRESS_AFTER_SECS = 1.0
SPIN_SECS = 0.1
SPINNERS = ("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", "|/-\\")
SHORTENED = ("command",)
"""Titles of columns that are cut where a terminal has no room for them: names and ids never are."""
CUT = "…"
ROUND_TRIP = "round trip"


def show(value: object, text: str, *, brief: str = "") -> None:
    """Print *text*; with ``--quiet`` *brief*, the names a script goes on with; with ``--json`` *value* as one line.

    JSON's non-ASCII is escaped: every pipe can carry that. No line is printed for no text.
    """
    invocation = call()
    printed = json.dumps(value) if invocation.json else brief if invocation.quiet else text
    if printed:
        click.echo(harmless(printed, colours_stay=True), color=colours.wanted(sys.stdout))


def say(text: str) -> None:
    """Print *text* on stderr, for people, whatever a server has put into it."""
    click.echo(harmless(text), err=True)


def show_timing(phases: Mapping[str, float], took_secs: float, what: str) -> None:
    """Print on stderr how long each of *phases* took, as the server says, and how long *what* did for us.

    A line each: a name, milliseconds with one digit, ``ms``. Nothing with ``--json``, whose object has the phases.
    """
    if call().json:
        return
    width = max(map(len, (*phases, ROUND_TRIP)))
    for phase, secs in phases.items():
        click.echo(f"{printable(phase):<{width}}  {secs * 1000:9.1f} ms", err=True)
    click.echo(f"{ROUND_TRIP:<{width}}  {took_secs * 1000:9.1f} ms  {printable(what)}", err=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an ASCII grid with a rule above and below every row, as scripts written for the predecessor expect.

    On a terminal, what is in a column *state* has its colour, and a last column that is too wide for it is cut.
    """
    lines = [[printable(cell) for cell in row] for row in (header, *rows)]
    widths = [max(_columns(cell) for cell in column) for column in zip(*lines, strict=True)]
    if sys.stdout.isatty():
        beyond = sum(widths) + 3 * len(widths) + 1 - _columns_of(sys.stdout)
        if header[-1] in SHORTENED and beyond > 0:
            widths[-1] = max(widths[-1] - beyond, len(header[-1]))
    rule = "+" + "+".join("-" * (width + 2) for width in widths) + "+"
    grid = [rule]
    for number, line in enumerate(lines):
        cells = []
        for title, cell, width in zip(header, line, widths, strict=True):
            shown = _cut(cell, width)
            blanks = " " * (width - _columns(shown))
            cells.append(f" {colours.state(shown, sys.stdout) if number and title == 'state' else shown}{blanks} ")
        grid += [f"|{'|'.join(cells)}|", rule]
    return "\n".join(grid)


def _cut(text: str, columns: int) -> str:
    """Return as much of *text* as *columns* have room for."""
    if _columns(text) <= columns:
        return text
    while text and _columns(text) > columns - 1:
        text = text[:-1]
    return f"{text}{CUT if can_say(CUT, sys.stdout) else '>'}"


def can_say(text: str, stream: TextIO) -> bool:
    """Return whether the encoding of *stream* has all of *text*."""
    try:
        text.encode(stream.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    """Return *text* with everything escaped that could move a cursor or break a line: labels come from anybody."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def harmless(text: str, *, colours_stay: bool = False) -> str:
    """Return *text* with everything escaped that could do something to a terminal. Lines stay, and colours may."""
    if text.isprintable():
        return text
    import re

    parts = re.split(r"(\x1b\[[0-9;]*m|\n)" if colours_stay else r"(\n)", text)  # every second: what it is split at
    return "".join(part if number % 2 else printable(part) for number, part in enumerate(parts))


def _columns(text: str) -> int:
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Show *what* and the seconds so far on stderr once it takes longer than one, in a line that is gone at the end.

    Nothing is shown with ``--quiet`` or unless stderr is a terminal that can do that.
    """
    stream = sys.stderr
    if not stream.isatty() or call().quiet or os.environ.get("TERM") == "dumb":
        yield
        return
    import threading

    ended = threading.Event()
    began = time.monotonic()
    frames = next(frames for frames in SPINNERS if can_say(frames, stream))

    def show() -> None:
        secs = PROGRESS_AFTER_SECS
        with suppress(OSError):  # the terminal is gone: whoever writes the result says so
            while not ended.wait(secs):
                passed = time.monotonic() - began
                frame = frames[int(passed / SPIN_SECS) % len(frames)]
                _replace_line(stream, f"{frame} {printable(what)} ... {passed:.0f} s")
                secs = SPIN_SECS

    ticker = threading.Thread(target=show, daemon=True)
    ticker.start()
    try:
        yield
    finally:
        ended.set()
        ticker.join()
        if time.monotonic() - began >= PROGRESS_AFTER_SECS:
            with suppress(OSError):
                _replace_line(stream, "")


def _replace_line(stream: TextIO, text: str) -> None:
    """Write *text* over the line the cursor is in, as much of it as one line has room for."""
    stream.write(f"\r{text[: _columns_of(stream) - 1]}\x1b[K")
    stream.flush()


def _columns_of(stream: TextIO) -> int:
    """Return how many columns the terminal behind *stream* has, 80 if it does not say."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
