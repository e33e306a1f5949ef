"""The Quart application, which finds and calls a request's handler itself: without what noid never uses of Quart's way.

Quart opens a session, binds its router anew, pushes and pops two contexts and asks for receivers of eight signals
around every handler. That took longer than all the rest of a request. Rules, converters, handlers, ``before_request``
and ``after_request`` functions, error handlers, `quart.request` and `quart.g` are Quart's and mean what they always
mean. There are no sessions, signals, blueprints, teardown functions, and no functions that are not ``async``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast
from urllib.parse import urlsplit

import trio
from quart import Quart, Request, Websocket
from quart.ctx import _AppCtxGlobals
from quart.globals import _cv_app, _cv_request, _cv_websocket
from quart.typing import ResponseTypes
from quart.wrappers import Response
from werkzeug.datastructures import Headers
from werkzeug.exceptions import HTTPException

from noid.server.hardening.exchange import WatchedApp


class App(WatchedApp):
    """A Quart application. Requests come to `respond`, WebSockets as always to `handle_websocket`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._urls = self.url_map.bind("")

    def request_of(self, scope: Mapping[str, Any]) -> Request:
        """Return the request of an ASGI *scope*; its body is filled by whoever reads the connection."""
        headers = Headers([("Remote-Addr", (scope["client"] or ("<local>",))[0])])
        for name, value in scope["headers"]:
            headers.add(name.decode("latin-1"), value.decode("latin-1"))
        if scope["http_version"] < "1.1":
            headers.setdefault("Host", "")
        return self.request_class(
            scope["method"],
            scope["scheme"],
            _path_of(scope["path"]),
            scope["query_string"],
            headers,
            "",
            scope["http_version"],
            scope,  # type: ignore[arg-type]  # a TypedDict, of which only this mapping is used
            max_content_length=self.config["MAX_CONTENT_LENGTH"],
            body_timeout=self.config["BODY_TIMEOUT"],
            send_push_promise=_push_nothing,
        )

    async def respond(self, request: Request) -> ResponseTypes:
        """Return the answer to *request*. What fails is answered by the error handlers, or as Quart's 500.

        To be called once in a task, which is the request's from then on.
        """
        context = _Context(self, request)
        _cv_app.set(context)  # type: ignore[arg-type]  # what of it is looked at
        _cv_request.set(context)  # type: ignore[arg-type]
        try:
            try:
                response = await self._result(request, self.before_request_funcs[None])
            except (Exception, BaseExceptionGroup) as error:
                response = await self.handle_user_exception(error)
            if not isinstance(response, Response):
                response = await self.make_response(response)
            for function in self.after_request_funcs[None]:
                response = await function(response)
        except BaseExceptionGroup as error:
            return await self.handle_exception(_without_cancellation(error))
        except Exception as error:
            return await self.handle_exception(error)
        else:
            return cast("ResponseTypes", response)  # what is made of a handler's result

    async def handle_websocket(self, websocket: Websocket) -> ResponseTypes | None:
        """Serve *websocket*; returns the answer if it was refused. Otherwise as `respond`."""
        context = _Context(self, websocket)
        _cv_app.set(context)  # type: ignore[arg-type]
        _cv_websocket.set(context)  # type: ignore[arg-type]
        try:
            try:
                result = await self._result(websocket, self.before_websocket_funcs[None])
            except (Exception, BaseExceptionGroup) as error:
                result = await self.handle_user_exception(error)
            response = None if result is None else await self.make_response(result)
            for function in self.after_websocket_funcs[None]:
                response = await function(response)  # type: ignore[misc]  # all of ours are async
        except BaseExceptionGroup as error:
            return await self.handle_websocket_exception(_without_cancellation(error))
        except Exception as error:
            return await self.handle_websocket_exception(error)
        else:
            return response

    async def _result(self, call: Request | Websocket, before: Iterable[Callable[[], Any]]) -> Any:
        """Return what the handler of *call* returns, or the first of the functions *before* it that says anything."""
        refusal: HTTPException | None = None
        try:
            rule, arguments = self._urls.match(
                call.path, call.method, return_rule=True, websocket=isinstance(call, Websocket)
            )
        except HTTPException as error:
            call.routing_exception = refusal = error
        else:
            call.url_rule, call.view_args = rule, dict(arguments)  # type: ignore[assignment]  # ours are Quart's
        for function in before:
            if (result := await function()) is not None:
                return result
        if refusal is not None:
            raise refusal
        return await self.view_functions[rule.endpoint](**arguments)  # type: ignore[misc]  # all of ours are async


class _Context:
    """What `quart.request`, `websocket`, `g` and `current_app` look at: all of Quart's contexts in one."""

    __slots__ = ("app", "g", "request", "request_websocket", "session", "url_adapter", "websocket")

    def __init__(self, app: Quart, call: Request | Websocket) -> None:
        self.app = app
        self.g = _AppCtxGlobals()
        self.request = self.websocket = self.request_websocket = call
        self.session = self.url_adapter = None


def _without_cancellation(group: BaseExceptionGroup) -> Exception:
    """Return *group* as what is to be answered; raises what of it is Cancelled, as quart-trio does."""
    cancelled, _ = group.split(trio.Cancelled)
    if cancelled is not None:
        raise cancelled from None
    if not isinstance(group, ExceptionGroup):
        raise group
    return group


def _path_of(target: str) -> str:
    """Return the path of what was asked for, which may be a whole URL."""
    if target.startswith("/"):
        return target
    try:
        return urlsplit(target).path
    except ValueError:
        return ""


async def _push_nothing(path: str, headers: Headers) -> None:
    """Do nothing: this is HTTP/1."""
