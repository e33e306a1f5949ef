"""Where a request comes from when there are proxies in front: ``X-Forwarded-For``, believed as far as it deserves."""

from __future__ import annotations

import functools

from noid.core.people import networks

UNIX = "local"
"""Stands for the address of whoever comes through the unix socket."""


class Origins:
    """Reads ``X-Forwarded-For``. *trusted*: True for one proxy, whoever that is; or the proxies' networks."""

    def __init__(self, trusted: bool | tuple[str, ...]) -> None:
        self._anybody = trusted is True
        self._networks = [networks.network(text) for text in trusted] if isinstance(trusted, tuple) else []

    def is_proxy(self, address: str) -> bool:
        """Whether a connection from *address* is a proxy's, behind which there are many clients."""
        return self._anybody or self._trusts(networks.parsed(address))

    def of(self, peer: str | None, forwarded: list[str]) -> str:
        """Return the address of the client behind *peer* (None: the unix socket) and the headers *forwarded*.

        Each proxy appends who it heard from, so the list is read from its end: up to the first that is no proxy of
        ours, or is no address at all. What is before that, anybody may have written.
        """
        client = peer or UNIX
        believed = (self._anybody or self._networks) if peer is None else self.is_proxy(client)
        if not forwarded or not believed:
            return client
        for text in reversed(",".join(forwarded).split(",")):
            hop = networks.parsed(text)
            if hop is None:
                break
            client = str(hop)
            if not self._trusts(hop):
                break
        return client

    def _trusts(self, address: networks.Address | None) -> bool:
        return address is not None and any(address in network for network in self._networks)


@functools.lru_cache(maxsize=4)
def origins(trusted: bool | tuple[str, ...]) -> Origins:
    """Return the `Origins` for a value of ``trust_forwarded_for``."""
    return Origins(trusted)
