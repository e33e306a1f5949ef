"""``noid api``: a request as one writes it, and its answer as it comes."""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

import click

from noid.cli.options import call, command
from noid.cli.output import printable
from noid.cli.streams import write
from noid.client import http
from noid.client.link import Link
from noid.client.waiting import Blocking, finished
from noid.core import wire
from noid.errors import NoidError

PIECE_BYTES = 65536
_METHOD = re.compile(r"[A-Z]+", re.ASCII)
_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x21-\x7e](?:[\t\x20-\x7e]*[\x21-\x7e])?)?", re.ASCII)
_OURS = ("Connection", "Content-Length", "Host", "Transfer-Encoding")
_REDIRECTED = 300
_NO_BODY = (204, 304)


@command(
    examples="""
noid api /v1/capabilities
noid api POST /v1/vms -d '{"name": "web"}'
noid api PATCH /v1/vms/web -d @labels.json
noid api PUT '/v1/vms/web/files?path=/srv/data' -d - < data
""",
)
@click.argument("words", nargs=-1, metavar="[METHOD] PATH")
@click.option("-d", "--data", metavar="BODY", help="What to send: a text, @FILE, or - for standard input.")
@click.option("-H", "--header", "headers", multiple=True, metavar="'NAME: VALUE'", help="A header; may be repeated.")
@click.option("-i", "--include", is_flag=True, help="Print status and headers before the body.")
def api(words: tuple[str, ...], data: str | None, headers: tuple[str, ...], include: bool) -> int:
    """Make a request of the server, with your token, and print the body of its answer as it comes.

    METHOD is GET, or POST with -d. Exit code 1 for an answer that is no success. docs/http.md has the routes.
    """
    method, path = _method_and_path(words, with_data=data is not None)
    content, described = _content(method, data)
    sent = {"Accept": "*/*"} | described | dict(map(_header, headers))
    link = Link(call().endpoint, Blocking())
    with closing(finished(http.exchange(link.endpoint, link.waiting, method, path, sent, content))) as answer:
        if include:
            told = "".join(f"{name}: {value}\n" for name, value in answer.headers.items())
            write(wire.STDOUT, f"HTTP/1.1 {answer.status}\n{told}\n".encode("latin-1"))
        last = b"\n"
        for piece in _pieces(answer, method):
            write(wire.STDOUT, piece)
            last = piece[-1:]
    if last != b"\n" and sys.stdout.isatty():
        write(wire.STDOUT, b"\n")
    if answer.status < _REDIRECTED:
        return 0
    if not include:
        click.echo(f"Error: {link.endpoint.address} answered {answer.status}.", err=True)
    return 1


def _method_and_path(words: tuple[str, ...], *, with_data: bool) -> tuple[str, str]:
    if not 1 <= len(words) <= 2:
        raise click.UsageError("give a method and a path: noid api GET /v1/vms")
    method = words[0].upper() if len(words) == 2 else "POST" if with_data else "GET"
    path = words[-1] if words[-1].startswith("/") else f"/{words[-1]}"
    if not _METHOD.fullmatch(method):
        raise click.UsageError(f"{printable(words[0])!r} is no method. Write GET, POST, PUT, PATCH or DELETE.")
    if not all("!" <= character <= "~" for character in path):
        raise click.UsageError(f"{printable(path)!r} is no path: what is not plain ASCII has to be percent-encoded.")
    return method, path


def _header(text: str) -> tuple[str, str]:
    found = _HEADER.fullmatch(text)
    if found is None:
        raise click.UsageError(f"{printable(text)!r} is no header. Write 'Name: value'.")
    name = "-".join(word.capitalize() for word in found[1].split("-"))  # so that one of ours is replaced, not joined
    if name in _OURS:
        raise click.UsageError(f"{name} cannot be chosen: it says how the request itself is sent.")
    return name, found[2] or ""


def _content(method: str, data: str | None) -> tuple[Iterator[bytes], dict[str, str]]:
    """Return what to send, piece by piece, and the headers that say what it is."""
    if data is None:
        return iter(()), {} if method in ("GET", "HEAD") else {"Content-Length": "0"}
    kind = {"Content-Type": "application/json"}
    if data != "-" and not data.startswith("@"):
        body = data.encode("utf-8", "surrogateescape")
        return iter((body,)), kind | {"Content-Length": str(len(body))}
    try:
        file = sys.stdin.buffer if data == "-" else Path(data[1:]).open("rb")  # noqa: SIM115  # read until we end
        status = os.fstat(file.fileno())
    except OSError as error:
        raise click.UsageError(f"cannot read {printable(data[1:] or 'standard input')}: {error.strerror}.") from error
    if stat.S_ISREG(status.st_mode):
        size = max(0, status.st_size - file.tell())
        return _read(file, size), kind | {"Content-Length": str(size)}
    return _read(file, None), kind | {"Transfer-Encoding": "chunked"}


def _read(file: BinaryIO, size: int | None) -> Iterator[bytes]:
    """Yield what *file* has; no more than *size*, which was announced."""
    left = size
    while left is None or left > 0:
        piece = file.read1(PIECE_BYTES if left is None else min(PIECE_BYTES, left))  # type: ignore[attr-defined]
        if not piece:
            if left:
                raise NoidError(f"the file ended {left} bytes before the size it had. The request was not completed.")
            return
        left = None if left is None else left - len(piece)
        yield piece


def _pieces(answer: http.Exchange, method: str) -> Iterator[bytes]:
    """Yield the body."""
    if method == "HEAD" or answer.status in _NO_BODY:
        return
    if "content-length" not in answer.headers and "chunked" not in answer.headers.get("transfer-encoding", "").lower():
        yield finished(answer.reply()).body  # until the connection ends
        return
    while piece := finished(answer.piece()):
        yield piece
