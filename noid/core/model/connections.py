"""TCP connections that a guest makes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from noid.errors import InvalidRequest

PORT_MAX = 65535
LOCALHOST = "localhost"
"""Both loopback addresses of a guest, 127.0.0.1 first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectRequest:
    """A TCP connection that a guest shall make, as *user*. *host* is an IP address, or `LOCALHOST`."""

    port: int
    host: str = LOCALHOST
    user: str | None = None

    @property
    def target(self) -> str:
        """Where it goes, for people: ``localhost:80``, ``[::1]:80``."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def checked_port(text: str) -> int:
    """Return the TCP port that *text* says.

    Raises:
        InvalidRequest: it says none.
    """
    if not (re.fullmatch(r"[1-9][0-9]{0,4}", text) and int(text) <= PORT_MAX):
        raise InvalidRequest(f"{text[:40]!r} is no port: it is a number from 1 to {PORT_MAX}.")
    return int(text)


def checked_host(text: str) -> str:
    """Return the host *text* as a guest can be told it.

    Raises:
        InvalidRequest: it is no IP address; names are not looked up.
    """
    import ipaddress  # which commands that connect nowhere need not wait for

    if text == LOCALHOST:
        return text
    try:
        address = ipaddress.ip_address(text[1:-1] if text[:1] + text[-1:] == "[]" else text)
        if "%" in text:
            raise ValueError("an address with a zone, which is the guest's to name")
    except ValueError as error:
        raise InvalidRequest(
            f"{text[:80]!r} is no IP address. Give one that the guest can reach, or {LOCALHOST!r}: names are not "
            "looked up."
        ) from error
    return str(address)
