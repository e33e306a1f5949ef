"""How the synchronous face is made from the asynchronous one: by waiting for it. No method is written twice.

A class here holds an object of `noid.sdk` and has its methods, made by `waited` and `wrapped`: with the same names,
parameters, types and documentation, as type checkers, editors and `inspect` see them.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from functools import wraps
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

from noid.client.waiting import finished

ItT = TypeVar("ItT")
ToT = TypeVar("ToT")
T = TypeVar("T")
P = ParamSpec("P")


class Face(Generic[ItT]):
    """The synchronous face of *it*, whose waiting is `noid.client.waiting.Blocking`."""

    def __init__(self, it: ItT) -> None:
        self._it = it

    def __repr__(self) -> str:
        return f"<{type(self).__module__}.{repr(self._it).removeprefix('<')}"


@overload
def waited(method: Callable[Concatenate[ItT, P], Coroutine[Any, Any, T]]) -> Callable[Concatenate[Face[ItT], P], T]: ...


@overload
def waited(
    method: Callable[Concatenate[ItT, P], Coroutine[Any, Any, T]], to: Callable[[T], ToT]
) -> Callable[Concatenate[Face[ItT], P], ToT]: ...


def waited(
    method: Callable[..., Coroutine[Any, Any, Any]], to: Callable[[Any], Any] | None = None
) -> Callable[..., Any]:
    """Return *method* for who waits until it is done, with its result made *to* a synchronous one."""

    @wraps(method)
    def wait(self: Face[Any], /, *args: Any, **kwargs: Any) -> Any:
        result = finished(method(self._it, *args, **kwargs))
        return result if to is None else to(result)

    return wait


def wrapped(
    method: Callable[Concatenate[ItT, P], T], to: Callable[[T], ToT]
) -> Callable[Concatenate[Face[ItT], P], ToT]:
    """Return *method*, which does not wait, with its result made *to* a synchronous one."""

    @wraps(method)
    def wrap(self: Face[Any], /, *args: Any, **kwargs: Any) -> ToT:
        return to(method(self._it, *args, **kwargs))

    return wrap


def each(to: Callable[[T], ToT]) -> Callable[[Iterable[T]], list[ToT]]:
    """Return what makes a list of what *to* makes of each."""
    return lambda items: [to(item) for item in items]
