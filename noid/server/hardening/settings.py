"""Hypercorn's settings as noid runs it."""

from __future__ import annotations

import logging
import ssl

from hypercorn.config import Config

from noid.core.config.settings import LimitsConfig
from noid.core.wire import API_VERSION, API_VERSION_HEADER
from noid.server.hardening.admission import Connections


class Settings(Config):
    """Hypercorn's configuration as noid runs it; every value here is a limit or switches something off."""

    write_timeout_secs: float = 10.0  # for WRITE_PIECE_BYTES: slower readers than 6.5 kB/s are dropped
    farewell_secs: float = 2.0  # in which a WebSocket's client that was too slow may still take what closes it
    linger_secs: float = 2.0
    tls: ssl.SSLContext | None = None  # for connections that begin from now on; None: they are in the clear

    accesslog = None
    errorlog = logging.getLogger("noid.server.hypercorn")
    alpn_protocols = ["http/1.1"]  # noqa: RUF012  # hypercorn's own declaration is this class attribute
    backlog = 1024
    graceful_timeout = 10.0
    h11_max_incomplete_size = 32 * 1024
    include_server_header = False
    keep_alive_max_requests = 1_000_000
    keep_alive_timeout = 5.0
    max_app_queue_size = 2
    websocket_max_message_size = 1 << 20
    websocket_ping_interval = None

    def __init__(self) -> None:
        super().__init__()
        self.connections = Connections()

    def take_up(self, limits: LimitsConfig) -> None:
        """Go by *limits* from the next connection on."""
        self.h11_max_incomplete_size = limits.max_header_bytes
        self.websocket_max_message_size = limits.max_message_bytes
        self.keep_alive_timeout = self.ssl_handshake_timeout = limits.header_timeout_secs
        self.connections.most = limits.max_connections
        self.connections.most_per_address = limits.max_connections_per_address

    def response_headers(self, protocol: str) -> list[tuple[bytes, bytes]]:
        """Return what every response carries, also those hypercorn makes on its own."""
        version = (API_VERSION_HEADER.lower().encode(), str(API_VERSION).encode())
        return [*super().response_headers(protocol), version]
