"""A request and what its answer must be, without the connection; and the error that a refusal is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import NoneType
from typing import Any, Generic, TypeVar, cast, get_args, get_origin, get_type_hints

from noid.client.errors import ServerError

RAW_TEXT_MAX = 200
PAGE_ITEMS = 1000
"""How much of a list is asked for at once: as much as a server gives."""
PAGES_MAX = 10_000
"""How many pages of a list are read before whoever sends them is not believed any more."""
UNAUTHENTICATED_HINT = "It may have expired or been revoked. Check NOID_TOKEN, or run: noid auth setup"

AnswerT = TypeVar("AnswerT")
ShapeT = TypeVar("ShapeT")


class NotNoid(ValueError):
    """What came is JSON of another shape, or none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer. Header names are lower case; of several headers with one name the last counts."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """Return the decoded body. Leading blanks, which keep a connection alive, are legal.

        Raises:
            ValueError: it is not JSON.
        """
        return json.loads(self.body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[AnswerT]):
    """One request.

    Attributes:
        path: With its query, as it is sent.
        body: What JSON can say, or None for no body.
        quick: Whether silence means that the agent is stuck. Work may take minutes.
        understand: Makes the answer of a successful reply; raises `NotNoid` for something noid-server would not say.
        add: Puts another page behind an answer that is a list; without it, what comes is all.
        unsafe_before: What servers before 0.3.0 cannot do although they know the route, in words, and what to do
            instead: they are not asked.
    """

    method: str
    path: str
    understand: Callable[[Reply], AnswerT]
    body: object = None
    quick: bool = True
    add: Callable[[AnswerT, AnswerT], object] | None = None
    unsafe_before: tuple[str, str] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


def with_query(path: str, **fields: str | int | float | Sequence[str] | None) -> str:
    """Return *path* with those of *fields* that are not None as its query; of a sequence, each."""
    given = {name: value for name, value in fields.items() if value is not None and value != ()}
    if not given:
        return path
    from urllib.parse import urlencode  # 2 ms that most questions do not cost

    return f"{path}?{urlencode(given, doseq=True)}"


def listed(path: str, shape: type[ShapeT]) -> Call[list[ShapeT]]:
    """Return the call for the whole list at *path*, which comes in pages from servers since 0.3.0."""
    path = f"{path}{'&' if '?' in path else '?'}limit={PAGE_ITEMS}"
    return Call(method="GET", path=path, understand=many(shape), add=list.extend)


def next_page(path: str, reply: Reply) -> str | None:
    """Return where the page behind *reply* to *path* is, None if it was the last.

    Raises:
        NotNoid: it says something that is no place.
    """
    target, _, what = reply.headers.get("link", "").partition(">")
    if "next" not in what:
        return None
    query = target.partition("?")[2]
    if not query or not query.isascii() or not query.isprintable() or " " in query:
        raise NotNoid
    return f"{path.partition('?')[0]}?{query}"  # a proxy may have rewritten what is before it


def one(shape: type[ShapeT]) -> Callable[[Reply], ShapeT]:
    """Return what takes a reply for one object that has the required keys of the TypedDict *shape*."""
    return lambda reply: _checked(_decoded(reply), shape)


def many(shape: type[ShapeT]) -> Callable[[Reply], list[ShapeT]]:
    """Return what takes a reply for a list of such objects."""

    def understand(reply: Reply) -> list[ShapeT]:
        items = _decoded(reply)
        if not isinstance(items, list):
            raise NotNoid
        return [_checked(item, shape) for item in items]

    return understand


def raw(method: str, path: str, body: object = None) -> Call[Any]:
    """Ask anything; answered with what the JSON of the answer says, or None for an answer without a body."""
    return Call(
        method=method,
        path=path,
        body=body,
        quick=False,
        understand=lambda reply: _decoded(reply) if reply.body.strip() else None,
    )


def nothing(_: Reply) -> None:
    """Take a reply for success, whatever it says."""


def refusal(address: str, reply: Reply) -> ServerError:
    """Return the error that *reply* of the agent at *address*, whose status is none of success, stands for."""
    status = reply.status
    try:
        fields = reply.json()
    except (ValueError, RecursionError):
        fields = None
    match fields:
        case {"error": str(text), **rest}:
            code = rest.get("code")
            if status == 401:
                text = f"{text.rstrip('.')}. {UNAUTHENTICATED_HINT}"
            return ServerError(text, status=status, code=code if isinstance(code, str) else None)
    if 300 <= status < 400:
        where = reply.headers.get("location", "elsewhere")
        return ServerError(f"it points to {where}. Give noid that URL: redirects are not followed.", status=status)
    text = " ".join(reply.body.decode("utf-8", "replace").split())
    if "html" in reply.headers.get("content-type", "") or text.startswith("<"):
        text = "a web page, not an answer of noid-server. Is the URL right, and is noid-server up behind that proxy?"
    elif not text:
        text = "no explanation. Is the URL right?"
    elif len(text) > RAW_TEXT_MAX:
        text = text[:RAW_TEXT_MAX] + " ..."
    return ServerError(f"{address} answered: {text}", status=status)


def _checked(item: object, shape: type[ShapeT]) -> ShapeT:
    if not _is_a(item, shape):
        raise NotNoid
    return cast("ShapeT", item)  # the line above is the check


def _is_a(value: object, hint: Any) -> bool:
    """Return whether *value*, which JSON said, is what *hint* says: a type of those that TypedDicts of ours are of."""
    if type(value) is hint or hint is Any:
        return True
    if (required := getattr(hint, "__required_keys__", None)) is not None:
        if not isinstance(value, dict) or not required <= value.keys():
            return False
        hints = _hints_of(hint)
        return all(_is_a(each, hints[key]) for key, each in value.items() if key in hints)
    arguments = get_args(hint)
    match get_origin(hint):
        case origin if origin is list:
            return isinstance(value, list) and all(_is_a(each, arguments[0]) for each in value)
        case origin if origin is dict:
            return isinstance(value, dict) and all(_is_a(each, arguments[1]) for each in value.values())
        case None:
            return value is None if hint is NoneType else hint is float and type(value) is int
    return any(_is_a(value, each) for each in arguments)  # of a union


@cache
def _hints_of(shape: type) -> dict[str, Any]:
    return get_type_hints(shape)


def _decoded(reply: Reply) -> object:
    try:
        return reply.json()
    except (ValueError, RecursionError) as error:
        raise NotNoid from error
