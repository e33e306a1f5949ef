"""Serving: an agent, an application around it, listening sockets, and an orderly end. The agent outlives all of it."""

from __future__ import annotations

import contextlib
import gc
import logging
import signal
from collections.abc import AsyncIterator, Callable
from functools import partial

import trio
from hypercorn.config import Sockets
from hypercorn.trio.run import worker_serve
from hypercorn.utils import wrap_app

from noid.core.agent import Agent
from noid.core.config.settings import Config
from noid.server import tls
from noid.server.answers import Answers
from noid.server.auditing import audited
from noid.server.calls import Calls
from noid.server.checkpoints import CheckpointRoutes
from noid.server.console import ConsoleRoutes
from noid.server.events import EventRoutes
from noid.server.files import FileRoutes
from noid.server.guard import Guard
from noid.server.hardening import App, Settings
from noid.server.listening import allow_many_files, has_terminal, tcp_listeners, unix_listener
from noid.server.logs import LogRoutes
from noid.server.metrics import Metrics, MetricsRoutes
from noid.server.notify import Notifier
from noid.server.open_streams import OpenStreams
from noid.server.openapi import DocumentRoutes
from noid.server.operations import OperationRoutes
from noid.server.origins import origins
from noid.server.ports import PortRoutes
from noid.server.power import PowerRoutes
from noid.server.processes import ProcessRoutes
from noid.server.quotas import QuotaRoutes
from noid.server.reload import Reloading
from noid.server.requestlog import log_requests
from noid.server.rest import VmRoutes, refuse_no_name
from noid.server.streams import ExecRoutes
from noid.server.table import Route, add_routes
from noid.server.tokens import TokenRoutes
from noid.server.users import UserRoutes
from noid.server.websockets import WebSockets

logger = logging.getLogger(__name__)

BODY_TIMEOUT_SECS = 30


async def serve(
    agent: Agent,
    config: Config,
    *,
    ready: Callable[[], None],
    notifier: Notifier | None = None,
    read_config: Callable[[], Config] | None = None,
) -> None:
    """Serve *agent* until SIGTERM or SIGINT; *ready* is called once when connections are accepted.

    Always on the unix socket, and on ``config.listen`` unless the agent is a local one. A signal stops the listening,
    ends WebSockets with 1012 and gives requests in flight a moment; a second one gives them none. VMs keep running.
    SIGHUP takes up what *read_config* returns then, or stops a server whose terminal is gone. The *notifier* is told.

    Raises:
        ConfigError: an address cannot be listened on, or the certificate cannot be used.
    """
    allow_many_files()
    stopping = trio.Event()
    life = _Life(notifier or Notifier({}), stopping)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(life.heed, signals, nursery.cancel_scope)
            await serve_until(stopping, agent, config, ready=ready, life=life, read_config=read_config)
            nursery.cancel_scope.cancel()


async def serve_until(
    stopping: trio.Event,
    agent: Agent,
    config: Config,
    *,
    ready: Callable[[], None],
    settings: Settings | None = None,
    life: _Life | None = None,
    read_config: Callable[[], Config] | None = None,
) -> None:
    """Serve *agent* until *stopping* is set. Otherwise as `serve`."""
    settings = settings or Settings()
    settings.tls = None if config.local else tls.load(config.tls)
    settings.take_up(config.limits)
    settings.connections.is_proxy = lambda address: origins(agent.config.trust_forwarded_for).is_proxy(address)
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(unix_listener(config.socket_path))]
        if not config.local:
            listeners += stack.enter_context(tcp_listeners(config.listen, secure=settings.tls is not None))
        metrics = Metrics()
        metrics.watch_connections(settings.connections)
        streams = OpenStreams(agent.users, stopping)
        app = create_app(agent, config, streams, metrics)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(streams.watch)
            nursery.start_soon(metrics.keep_measuring, agent.services.layout, stopping)
            await nursery.start(
                partial(
                    worker_serve,
                    wrap_app(app, 0, "asgi"),
                    settings,
                    sockets=Sockets([], listeners, []),
                    shutdown_trigger=stopping.wait,
                )
            )
            url = f"{'http' if settings.tls is None else 'https'}://{config.listen}"
            where = str(config.socket_path) if config.local else f"{config.socket_path} and {url}"
            logger.info("serving %s", where)
            if life is not None:
                life.begin(where, Reloading(agent, app, settings, read_config) if read_config is not None else None)
            ready()
            gc.collect()
            gc.freeze()  # what exists by now is permanent: not walking it again keeps pauses below a millisecond


class _Life:
    """What signals mean to a server, and what the service manager hears of it."""

    def __init__(self, notifier: Notifier, stopping: trio.Event) -> None:
        self._notifier = notifier
        self._stopping = stopping
        self._reloading: Reloading | None = None
        self._status = "Starting"
        self._began_in_terminal = has_terminal()

    def begin(self, where: str, reloading: Reloading | None) -> None:
        """Say that requests are answered, at *where*. SIGHUP is for *reloading* from now on."""
        self._status, self._reloading = f"Serving {where}", reloading
        self._notifier.ready(self._status)

    async def heed(self, signals: AsyncIterator[int], everything: trio.CancelScope) -> None:
        """Do what *signals* mean. *everything* is cancelled when it has to end at once."""
        async for signo in signals:
            if signo == signal.SIGHUP and not (self._began_in_terminal and not has_terminal()):
                self._reload()
                continue
            if self._stopping.is_set():
                logger.warning("stopping at once: second %s", signal.Signals(signo).name)
                everything.cancel()
            logger.info("stopping: %s. VMs keep running.", signal.Signals(signo).name)
            self._notifier.stopping()
            self._stopping.set()

    def _reload(self) -> None:
        if self._reloading is None or self._stopping.is_set():
            return
        self._notifier.reloading()
        try:
            self._reloading.reload()
        except Exception:  # a bug here must not end what serves
            logger.exception("the configuration was not read anew")
        self._notifier.ready(self._status)


def create_app(agent: Agent, config: Config, streams: OpenStreams, metrics: Metrics) -> App:
    """Return the application: every route, behind the guard, counted. *streams* end what is open."""
    app = App("noid.server", static_folder=None)
    app.config.update(
        MAX_CONTENT_LENGTH=agent.config.limits.max_body_bytes,
        BODY_TIMEOUT=BODY_TIMEOUT_SECS,
        RESPONSE_TIMEOUT=None,  # K: it truncates; slow readers are dropped by the bounded writes
        PROVIDE_AUTOMATIC_OPTIONS=False,
    )
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    answers = Answers(agent)
    log_requests(app)
    websockets = WebSockets(agent, answers, streams)
    table = Calls(agent).around(all_routes(agent, websockets, metrics))
    routes = add_routes(app, audited(agent, table))
    metrics.watch(app, routes)
    metrics.watch_agent(agent, websockets)
    Guard(agent, metrics).protect(app, routes)
    app.before_request(refuse_no_name)
    app.register_error_handler(Exception, answers.answer)
    return app


def all_routes(agent: Agent, websockets: WebSockets, metrics: Metrics) -> list[Route]:
    """Return everything a server answers, as a table."""
    routes = [
        *VmRoutes(agent).routes(),
        *TokenRoutes(agent).routes(),
        *QuotaRoutes(agent).routes(),
        *UserRoutes(agent).routes(),
        *CheckpointRoutes(agent).routes(),
        *PowerRoutes(agent).routes(),
        *OperationRoutes(agent).routes(),
        *EventRoutes(agent, websockets).routes(),
        *ExecRoutes(agent, websockets).routes(),
        *ProcessRoutes(agent, websockets).routes(),
        *ConsoleRoutes(agent, websockets).routes(),
        *LogRoutes(agent, websockets).routes(),
        *FileRoutes(agent).routes(),
        *PortRoutes(agent, websockets).routes(),
        *MetricsRoutes(agent, metrics).routes(),
    ]
    routes += DocumentRoutes(lambda: routes).routes()
    return routes
