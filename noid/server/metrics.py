"""What a server counts and measures, for Prometheus. The only module that knows prometheus-client.

Labels are what there is a bounded number of: routes as the table has them, statuses, kinds of operations and their
steps, states. Never a user, a VM, an address or a path that somebody has typed.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import trio
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from quart import Response, request, websocket
from quart.typing import ResponseTypes

from noid import __version__, hostextents
from noid.core.agent import Agent
from noid.core.backends import Event
from noid.core.layout import Layout
from noid.core.model.users import Scope
from noid.core.model.vms import VmState
from noid.core.operations.outcomes import OperationState
from noid.errors import Forbidden, NoidError
from noid.server.hardening import App, Connections
from noid.server.schemas.vocabulary import Content, text
from noid.server.table import Route
from noid.server.visit import current_caller, visit
from noid.server.websockets import WebSockets

logger = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LAG_EVERY_SECS = 1.0
DISK_EVERY_SECS = 300.0

_REQUEST_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_OPERATION_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180, 600)
_LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)

_NO_ROUTE = ("", "none")
"""Method and path of requests that no route answers: what they asked for is for whoever asked to choose."""


class Metrics:
    """The counters of one server, in a registry of their own; `show` prints them with what is true at that moment."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._labels: Mapping[str, tuple[str, str]] = {}
        self._requests = Counter(
            "noid_requests", "Requests answered.", ("method", "route", "status"), registry=registry
        )
        self._request_secs = Histogram(
            "noid_request_seconds", "From a request's head to its answer's head.", ("method", "route"),
            buckets=_REQUEST_BUCKETS, registry=registry,
        )  # fmt: skip
        self._refusals = Counter(
            "noid_auth_failures", "Who was not let in, by the code of the error.", ("code",), registry=registry,
        )  # fmt: skip
        self._operations = Counter(
            "noid_operations", "Operations that have ended.", ("kind", "outcome"), registry=registry
        )
        self._operation_secs = Histogram(
            "noid_operation_seconds", "From the beginning of an operation to its end.", ("kind", "outcome"),
            buckets=_OPERATION_BUCKETS, registry=registry,
        )  # fmt: skip
        self._phase_secs = Histogram(
            "noid_operation_phase_seconds", "The steps of operations that succeeded, and what they measured.",
            ("kind", "phase"), buckets=_OPERATION_BUCKETS, registry=registry,
        )  # fmt: skip
        self._stored = Gauge(
            "noid_stored_bytes", "What lies on the disk; what several share counts once, for the first.", ("kind",),
            registry=registry,
        )  # fmt: skip
        self._lag_secs = Histogram(
            "noid_loop_lag_seconds", "How late the server's loop came to what was due.", buckets=_LAG_BUCKETS,
            registry=registry,
        )  # fmt: skip
        Gauge("noid_build_info", "1, with the version.", ("version",), registry=registry).labels(__version__).set(1)
        ProcessCollector(registry=registry)

    def watch(self, app: App, routes: Mapping[str, Route]) -> None:
        """Count every request of *app*, whose *routes* are known by endpoint."""
        self._labels = {endpoint: (route.method, route.path) for endpoint, route in routes.items()}
        app.after_request(self._answered)
        app.after_websocket(self._not_upgraded)

    def watch_agent(self, agent: Agent, websockets: WebSockets) -> None:
        """Show the operations, VMs, pool and disk of *agent*, and its open *websockets*, from now on."""
        self._registry.register(_Standing(agent, websockets))
        agent.services.events.listen(self.note)

    def watch_connections(self, connections: Connections) -> None:
        """Show how many *connections* there are, and how many were refused, from now on."""
        self._registry.register(_Accepted(connections))

    def refused(self, error: NoidError) -> None:
        """Take note of somebody who was not let in."""
        self._refusals.labels(error.code).inc()

    def note(self, event: Event) -> None:
        """Take note of what has happened: of an operation that has ended, its time and its phases."""
        if event.kind != "operation.end":
            return
        kind, outcome = event.facts["kind"], event.facts["state"]
        self._operations.labels(kind, outcome).inc()
        self._operation_secs.labels(kind, outcome).observe(max(0.0, event.facts["secs"]))
        if outcome == OperationState.SUCCEEDED.value:
            for phase, secs in event.facts["timings"].items():
                self._phase_secs.labels(kind, phase).observe(secs)

    async def keep_measuring(self, layout: Layout, stopping: trio.Event) -> None:
        """Measure how late the loop is and what lies on the disk, until *stopping* is set."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_loop)
            nursery.start_soon(self._watch_disk, layout)
            await stopping.wait()
            nursery.cancel_scope.cancel()

    async def _watch_loop(self) -> None:
        while True:
            due = trio.current_time() + LAG_EVERY_SECS
            await trio.sleep_until(due)
            self._lag_secs.observe(trio.current_time() - due)

    async def _watch_disk(self, layout: Layout) -> None:
        while True:
            try:
                stored = await trio.to_thread.run_sync(_stored_bytes, layout, abandon_on_cancel=True)
            except OSError as error:
                logger.warning("what lies on the disk cannot be measured, so its metric is old: %s", error)
            else:
                for kind, size in stored.items():
                    self._stored.labels(kind).set(size)
            await trio.sleep(DISK_EVERY_SECS)

    def show(self) -> bytes:
        """Return everything in Prometheus' text format. Blocks for some milliseconds."""
        return generate_latest(self._registry)

    async def _answered(self, response: ResponseTypes) -> ResponseTypes:
        self._count(request.url_rule, response.status_code)
        return response

    async def _not_upgraded(self, response: ResponseTypes | None) -> ResponseTypes | None:
        if response is not None:  # None: it was a WebSocket after all
            self._count(websocket.url_rule, response.status_code)
        return response

    def _count(self, rule: Any, status: int) -> None:
        method, path = _NO_ROUTE if rule is None else self._labels.get(rule.endpoint, _NO_ROUTE)
        self._requests.labels(method, path, status).inc()
        self._request_secs.labels(method, path).observe(time.monotonic() - visit().began)


def _stored_bytes(layout: Layout) -> dict[str, int]:
    """Return what each kind of thing adds to those before it. Blocks."""
    roots = {
        "images": layout.images, "templates": layout.golden, "checkpoints": layout.users, "vms": layout.vms,
    }  # fmt: skip
    stored: dict[str, int] = {}
    before: list[Path] = []
    for kind, root in roots.items():
        own = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
        stored[kind] = hostextents.occupied_bytes(own, before)
        before += own
    return stored


class _Standing(Collector):
    """What is not counted but looked up when somebody asks."""

    def __init__(self, agent: Agent, websockets: WebSockets) -> None:
        self._agent = agent
        self._websockets = websockets

    def collect(self) -> Iterable[Metric]:
        """Yield what is true now."""
        states = self._agent.services.store.vms_by_state()
        vms = GaugeMetricFamily("noid_vms", "VMs of all users by state.", labels=["state"])
        for state in VmState:
            vms.add_metric([state.value], states.get(state, 0))
        yield vms
        yield GaugeMetricFamily("noid_websocket_sessions", "WebSockets that are open.", self._websockets.open_sessions)
        yield GaugeMetricFamily(
            "noid_tunnels", "TCP connections to ports of guests that are open.", self._agent.guests.tunnels.open
        )
        yield GaugeMetricFamily(
            "noid_waiting_machines", "Machines that wait for the next create.", self._agent.waiting_machines
        )
        yield GaugeMetricFamily(
            "noid_ready_copies",
            "Copies of the checkpoint that was restored last.",
            self._agent.ready_copies,
        )
        disk = shutil.disk_usage(self._agent.config.data_dir)
        yield GaugeMetricFamily("noid_disk_size_bytes", "Of the file system with the data directory.", disk.total)
        yield GaugeMetricFamily("noid_disk_free_bytes", "Of the file system with the data directory.", disk.free)


class _Accepted(Collector):
    """The connections of a server, looked up when somebody asks."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def collect(self) -> Iterable[Metric]:
        """Yield what is true now."""
        yield GaugeMetricFamily("noid_connections", "TCP connections that are open.", self._connections.open)
        yield CounterMetricFamily(
            "noid_connections_refused", "TCP connections that were one too many.", self._connections.refused
        )


class MetricsRoutes:
    """``/metrics``, for who runs the server."""

    def __init__(self, agent: Agent, metrics: Metrics) -> None:
        self._agent = agent
        self._metrics = metrics

    def routes(self) -> list[Route]:
        """Return the lines of the table."""
        shown = Content(media={"text/plain": text()})
        return [Route(method="GET", path="/metrics", handler=self.show, answers={200: shown})]

    async def show(self) -> Response:
        """Tell what the server counts, as Prometheus reads it: to the local user, and to those in ``metrics_users``.

        It is of all users together, so that it is not for everybody.
        """
        caller = current_caller()
        if not visit().is_local and caller.user.name not in self._agent.config.metrics_users:
            raise Forbidden(
                Scope.ADMIN, caller.token, or_else="ask as a user whom `metrics_users` names in server.toml"
            )
        return Response(self._metrics.show(), content_type=CONTENT_TYPE)
