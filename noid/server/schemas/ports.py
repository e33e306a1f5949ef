"""Connections to ports of guests."""

from __future__ import annotations

from noid.core.model.connections import LOCALHOST, PORT_MAX
from noid.server.schemas.vocabulary import text

PORT = text(pattern="^[1-9][0-9]{0,4}$", about=f"A TCP port, up to {PORT_MAX}.")

CONNECT = {
    "host?": text(about=f"An IP address that the guest can reach; `{LOCALHOST}`, its own, if missing."),
    "user?": text(least=1, about="Which user of the guest connects; the image's if missing."),
}
"""The query of a connection."""
