"""The Quart application, which finds and calls a request's handler itself: without what noid never uses of Quart's way.

Quart opens a session, binds its router anew, pushes and pops two contexts and asks for receivers of eight signals
around every handler. That took longer than all the rest of a request. Rules, converters, handlers, ``before_request``
and ``after_request`` functions, error handlers, `quart.request` and `quart.g` are Quart's and mean what they always
mean. There are no sessions, signals, blueprints, teardown functions, and no functions that are not ``async``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import trio
from quart import Quart, Request
from quart.ctx import _AppCtxGlobals
from quart.globals import _cv_app, _cv_request
from quart.typing import ResponseTypes
from quart.wrappers import Response
from werkzeug.datastructures import Headers
from werkzeug.exceptions import HTTPException

from noid.server.hardening.exchange import WatchedApp
from noid.server.hardening.websocket import WebsocketConnection


class App(WatchedApp):
    """A Quart application. WebSockets it serves as Quart does, requests by `respond`."""

    asgi_websocket_class = WebsocketConnection

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
                response = await self._handled(request)
            except (Exception, BaseExceptionGroup) as error:
                response = await self.make_response(await self.handle_user_exception(error))
            for function in self.after_request_funcs[None]:
                response = await function(response)
        except BaseExceptionGroup as error:
            filtered, _ = error.split(trio.Cancelled)
            if filtered is not None:
                raise filtered from None
            return await self.handle_exception(error)  # type: ignore[arg-type]  # as in quart-trio
        except Exception as error:
            return await self.handle_exception(error)
        else:
            return response

    async def _handled(self, request: Request) -> ResponseTypes:
        refusal: HTTPException | None = None
        try:
            rule, arguments = self._urls.match(request.path, request.method, return_rule=True)
        except HTTPException as error:
            request.routing_exception = refusal = error
        else:
            request.url_rule, request.view_args = rule, dict(arguments)  # type: ignore[assignment]  # ours are Quart's
        result: Any
        for function in self.before_request_funcs[None]:
            if (result := await function()) is not None:  # type: ignore[misc]  # all of ours are async
                return await self.make_response(result)
        if refusal is not None:
            raise refusal
        result = await self.view_functions[rule.endpoint](**arguments)  # type: ignore[misc]  # the same
        return result if isinstance(result, Response) else await self.make_response(result)


class _Context:
    """What `quart.request`, `quart.g` and `quart.current_app` look at: both of Quart's contexts in one."""

    __slots__ = ("app", "g", "request", "request_websocket", "session", "url_adapter")

    def __init__(self, app: Quart, request: Request) -> None:
        self.app = app
        self.g = _AppCtxGlobals()
        self.request = self.request_websocket = request
        self.session = self.url_adapter = None


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
