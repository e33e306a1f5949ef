"""TCP connections to ports of guests, each over a WebSocket of its own: ``/v1/vms/<name>/ports/<port>``.

A binary message is bytes, in either direction, of any length; an empty one says that no more comes from there, and what
the other side still sends goes on. When both have said so the server closes with 1000. A connection that broke is told
as a text message, ``{"error", "code"}``, and a client that leaves before the end resets it: what is cut off never looks
like what has ended.

Nothing is kept here: what a client does not take is not read from the guest, what the guest does not take is not read
from the client.
"""

from __future__ import annotations

from functools import partial

import trio
from quart import Response, websocket

from noid.core.agent import Agent
from noid.core.backends import GuestConnection
from noid.core.model.connections import LOCALHOST, ConnectRequest, checked_host, checked_port
from noid.core.model.names import checked_name
from noid.core.model.users import Scope
from noid.core.waiting import plain_nursery
from noid.server.answers import upgrade_required
from noid.server.hardening import Transport
from noid.server.schemas.failures import GUEST, UPGRADE_REQUIRED
from noid.server.schemas.ports import CONNECT
from noid.server.table import WS, Route
from noid.server.visit import current_user
from noid.server.websockets import WebSockets, watch_peer


class PortRoutes:
    """``/v1/vms/<name>/ports/<port>``."""

    def __init__(self, agent: Agent, websockets: WebSockets) -> None:
        self._agent = agent
        self._websockets = websockets

    def routes(self) -> list[Route]:
        """Return the lines of the table."""
        path = "/v1/vms/<name>/ports/<port>"
        return [
            Route(
                method="GET", path=path, handler=self.upgrade_required, scope=Scope.EXEC,
                answers={426: UPGRADE_REQUIRED},
            ),
            Route(
                method=WS, path=path, handler=self.stream, scope=Scope.EXEC,
                query=CONNECT, answers={101: None}, errors=GUEST | {502},
            ),
        ]  # fmt: skip

    async def upgrade_required(self, name: str, port: str) -> Response:
        """Say that GET is for WebSockets: 426."""
        checked_name(name)
        checked_port(port)
        return upgrade_required("this needs a WebSocket upgrade; noid port-forward makes a port of this machine of it")

    async def stream(self, name: str, port: str) -> None:
        """Connect to a port of the guest, over TCP and from inside it, so that it needs no network.

        The upgrade is answered when the connection stands; until then everything that goes wrong is plain HTTP, 502
        when nothing listens there. Then binary messages carry its bytes both ways, and an empty one the end of a
        direction.
        """
        request = ConnectRequest(
            port=checked_port(port),
            host=checked_host(websocket.args.get("host", LOCALHOST)),
            user=websocket.args.get("user"),
        )
        async with self._agent.guests.connection(current_user(), checked_name(name), request) as connection:
            relay = partial(_relay, connection, Transport.of(websocket.scope))
            await self._websockets.hold(relay, counted=False)


async def _relay(connection: GuestConnection, transport: Transport) -> None:
    """Carry bytes both ways until both have ended. A client that leaves cancels this."""
    async with plain_nursery() as nursery:
        nursery.start_soon(_to_guest, connection, transport, nursery.cancel_scope)
        while data := await connection.receive_some():
            await websocket.send(data)
        await websocket.send(b"")
        await connection.wait_closed()
        nursery.cancel_scope.cancel()


async def _to_guest(connection: GuestConnection, transport: Transport, relay: trio.CancelScope) -> None:
    """Read the WebSocket for as long as it is open: that is also how a leaving client is noticed."""
    ended = False
    while True:
        message = await websocket.receive()
        if not isinstance(message, bytes) or ended:
            continue
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch_peer, transport, relay)
            ended = not message
            await (connection.send_all(message) if message else connection.send_eof())
            nursery.cancel_scope.cancel()
