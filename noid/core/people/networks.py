"""Addresses of clients: which network one is in, and what counts as one place."""

from __future__ import annotations

import functools
import ipaddress

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_PLACE_BITS = 64  # of an IPv6 address: whoever has one has all of these


def parsed(text: str) -> Address | None:
    """Return the address *text* is, alone or as proxies write it with a port; None for anything else.

    An IPv4 address that came over an IPv6 socket is an IPv4 address.
    """
    text = text.strip().strip('"')
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        return found.ipv4_mapped
    return found


def network(text: str) -> Network:
    """Return the network that *text*, an address or ``address/bits``, stands for.

    Raises:
        ValueError: none; says why.
    """
    return ipaddress.ip_network(text, strict=False)


@functools.lru_cache(maxsize=4096)
def place(address: str) -> str:
    """Return what counts as one place: an IPv4 address, or the /64 an IPv6 address is in."""
    found = parsed(address)
    if not isinstance(found, ipaddress.IPv6Address):
        return address if found is None else str(found)
    return str(ipaddress.IPv6Network((int(found) >> _PLACE_BITS << _PLACE_BITS, _PLACE_BITS)))
