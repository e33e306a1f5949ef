"""Transcripts: conversations with a server, written for people, that can be replayed. Text in, steps out; no sockets.

A transcript is the documentation of the protocol and its test at once. Lines that begin with ``>`` are what the client
sends, lines with ``<`` what it must hear, lines with ``#`` explain, and lines with ``=`` say what there is beforehand
(see ``tests/transcripts/README.md``, which is written for readers of transcripts).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

KINDS: Mapping[str, str] = {
    "any": r".*?",
    "hex8": r"[0-9a-f]{8}",
    "hex12": r"[0-9a-f]{12}",
    "hex16": r"[0-9a-f]{16}",
    "uuid": r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "time": r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d",
    "instant": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d:\d\d)",
    "number": r"-?\d+(?:\.\d+)?(?:e-?\d+)?",
    "token": r"noid_tok_[0-9a-f]{64}",
    "version": r"\d+\.\d+\.\d+[a-z0-9.]*",
    "text": r'[^"\r\n]*',
}
"""What a placeholder stands for, by the word in it."""

_PLACEHOLDER = re.compile(r"<([a-z][a-z0-9-]*)(?::([a-z0-9]+))?>")
_REQUEST = re.compile(r"[A-Z]+ \S+ HTTP/\d\.\d")
_FRAME = re.compile(r"(text|binary|close|ping|pong)(?: (.*))?", re.DOTALL)
_END = "(end)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Something that happens, at *line* of its file."""

    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Given(Step):
    """What there is from here on, or which connection is meant: the words behind ``=``."""

    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Request(Step):
    """The client sends a request: its head's lines, and its body."""

    head: tuple[str, ...]
    body: str

    @property
    def method(self) -> str:
        """Its method."""
        return self.head[0].split(" ")[0]

    @property
    def target(self) -> str:
        """Its path and query."""
        return self.head[0].split(" ")[1]

    @property
    def upgrades(self) -> bool:
        """Whether it asks for a WebSocket."""
        return any(line.lower() == "upgrade: websocket" for line in self.head)


@dataclass(frozen=True, slots=True, kw_only=True)
class Response(Step):
    """The client must hear a response: these headers, each once, not the *absent* ones, and this body."""

    status: int
    reason: str
    headers: tuple[tuple[str, str], ...]
    absent: tuple[str, ...]
    body: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame(Step):
    """A WebSocket frame: of the client, or one it must hear.

    *payload*: the text of a text frame; of a binary one its data as text, without the first byte, *channel* (which
    None stands for if there is none); of the others their data, for close ``code reason``.
    """

    mine: bool
    kind: str
    payload: str
    channel: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class End(Step):
    """One side closes the connection."""

    mine: bool


def parse(text: str) -> list[Step]:
    """Return the steps of a transcript.

    Raises:
        ValueError: a line that means nothing, with its number.
    """
    steps: list[Step] = []
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        begin = at + 1
        mark, rest = lines[at][:1], lines[at][2:]
        if mark in ("", "#"):
            at += 1
            continue
        if mark == "=":
            steps.append(Given(line=begin, words=rest))
            at += 1
            continue
        if mark not in "<>" or lines[at][1:2] not in ("", " "):
            raise ValueError(f"line {begin}: it begins with none of: # = > <")
        if _REQUEST.match(rest) or rest.startswith("HTTP/"):
            block: list[str] = []
            while at < len(lines) and lines[at][:1] == mark and not (block and _begins(lines[at][2:], block)):
                block.append(lines[at][2:])
                at += 1
            steps.append(_message(begin, mark, block))
            continue
        steps.append(_frame(begin, mine=mark == ">", text=rest))
        at += 1
    return steps


def pattern(text: str, known: Mapping[str, str]) -> re.Pattern[str]:
    """Return what *text*, which a client must hear, matches: *known* names and `KINDS` in angle brackets, and ``...``.

    Groups are what the client remembers; see `remembered`.

    Raises:
        ValueError: a placeholder that means nothing.
    """
    made, at = "", 0
    for found in re.finditer(rf"{_PLACEHOLDER.pattern}|\.\.\.", text):
        made += re.escape(text[at : found.start()])
        at = found.end()
        name, kind = found[1], found[2]
        if name is None:
            made += ".*?"
        elif kind is not None:
            made += f"(?P<{name.replace('-', '_')}>{_kind(kind)})"
        elif name in known:
            made += re.escape(known[name])
        else:
            made += _kind(name)
    return re.compile(made + re.escape(text[at:]), re.DOTALL)


def remembered(match: re.Match[str]) -> dict[str, str]:
    """Return what *match*, of a `pattern`, gave names to."""
    return {name.replace("_", "-"): value for name, value in match.groupdict().items()}


def filled(text: str, known: Mapping[str, str]) -> str:
    """Return *text*, which the client sends, with what it knows in place of names.

    Raises:
        ValueError: it knows nothing of that name.
    """

    def value(found: re.Match[str]) -> str:
        if found[1] not in known:
            raise ValueError(f"nothing was called <{found[1]}> before")
        return known[found[1]]

    return _PLACEHOLDER.sub(value, text)


def _kind(word: str) -> str:
    if word not in KINDS:
        raise ValueError(f"<{word}> is neither a name from before nor one of: {', '.join(sorted(KINDS))}")
    return KINDS[word]


def _begins(rest: str, block: list[str]) -> bool:
    """Whether *rest* begins a message of its own: a head, or a frame after a head without a body."""
    if _REQUEST.match(rest) or rest.startswith("HTTP/"):
        return True
    return "" not in block and (rest == _END or bool(_FRAME.fullmatch(rest)))


def _message(line: int, mark: str, block: list[str]) -> Step:
    blank = block.index("") if "" in block else len(block)
    head, body = block[:blank], "\n".join(block[blank + 1 :])
    if mark == ">":
        return Request(line=line, head=tuple(head), body=body)
    status = re.fullmatch(r"HTTP/1\.1 (\d{3})(?: (.*))?", head[0])
    if status is None:
        raise ValueError(f"line {line}: {head[0]!r} is no status line")
    absent = [match[1] for match in (re.fullmatch(r"\(no (\S+)\)", text) for text in head[1:]) if match]
    headers = []
    for text in head[1:]:
        name, colon, value = text.partition(": ")
        if colon:
            headers.append((name.lower(), value))
        elif not text.startswith("(no "):
            raise ValueError(f"line {line}: {text!r} is no header")
    return Response(
        line=line,
        status=int(status[1]),
        reason=status[2] or "",
        headers=tuple(headers),
        absent=tuple(name.lower() for name in absent),
        body=body,
    )


def _frame(line: int, *, mine: bool, text: str) -> Step:
    if text == _END:
        return End(line=line, mine=mine)
    found = _FRAME.fullmatch(text)
    if found is None:
        raise ValueError(f"line {line}: {text!r} is neither a head, nor a frame, nor {_END}")
    kind, payload = found[1], found[2] or ""
    if kind != "binary":
        return Frame(line=line, mine=mine, kind=kind, payload=payload)
    channel, _, data = payload.partition(" ")
    return Frame(
        line=line,
        mine=mine,
        kind=kind,
        payload=str(json.loads(data)) if data else "",
        channel=int(channel, 16) if channel else None,
    )
