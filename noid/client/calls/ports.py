"""Which ports of a VM something listens on."""

from __future__ import annotations

import re
import socket
import struct
from dataclasses import dataclass
from typing import TypedDict

from noid.client.calls.call import Call, Reply, one
from noid.core.model.connections import LOCALHOST

_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")
_LISTEN = "0A"
_LINE = re.compile(r" *\d+: ([0-9A-F]{8}|[0-9A-F]{32}):([0-9A-F]{4}) [0-9A-F]+:[0-9A-F]{4} ([0-9A-F]{2}) ")
_REACHED_BY_LOCALHOST = frozenset({"0.0.0.0", "127.0.0.1", "::", "::1"})  # noqa: S104  # nothing is bound here
_MAPPED = "::ffff:"


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class GuestPort:
    """A port that something in a guest listens on. *host* is where to connect to: see `ConnectRequest`."""

    port: int
    host: str = LOCALHOST


class _Output(TypedDict):
    stdout: str


def listening(name: str) -> Call[list[GuestPort]]:
    """Ask which ports of the VM *name* are listened on, lowest first; of a guest without ``cat``, none are found."""

    def understand(reply: Reply) -> list[GuestPort]:
        return parse(one(_Output)(reply)["stdout"])

    body = {"command": ["cat", *_TABLES]}
    return Call(method="POST", path=f"/v1/vms/{name}/exec", body=body, quick=False, understand=understand)


def parse(tables: str) -> list[GuestPort]:
    """Return the ports in the kernel's tables of TCP sockets, of both families, as little-endian guests print them."""
    found: set[GuestPort] = set()
    for line in tables.splitlines():
        fields = _LINE.match(line)
        if fields is None or fields[3] != _LISTEN or fields[2] == "0000":
            continue
        address, port = _address(fields[1]), int(fields[2], 16)
        found.add(GuestPort(port=port, host=LOCALHOST if address in _REACHED_BY_LOCALHOST else address))
    return sorted(found)


def _address(text: str) -> str:
    """Return the address whose 32-bit words, each in the guest's byte order, are *text*."""
    words = [int(text[at : at + 8], 16) for at in range(0, len(text), 8)]
    raw = struct.pack(f"<{len(words)}I", *words)
    address = socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)
    return address.removeprefix(_MAPPED)
