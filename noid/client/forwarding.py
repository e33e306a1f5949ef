"""Ports of this machine that lead to ports of guests: listening, and a thread for each connection."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NoReturn

from noid.client.link import Link
from noid.client.port_stream import LocalGone, PortStream, SocketEnd, relay
from noid.client.settings import Endpoint
from noid.client.waiting import Blocking, finished
from noid.core.model.connections import LOCALHOST, checked_host, checked_port
from noid.errors import Conflict, InvalidRequest, NoidError

LOOPBACK = ("127.0.0.1", "::1")
CONNECTIONS_MAX = 256
"""At a time; the next ones wait. A VM has no more anyway."""
ANY = 0
_TRIES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """A port of this machine, `ANY` for a free one, and where it leads to in the guest."""

    local_port: int
    remote_port: int
    remote_host: str = LOCALHOST

    @property
    def target(self) -> str:
        """Where it leads to, for people: a port, or an address and a port."""
        if self.remote_host == LOCALHOST:
            return str(self.remote_port)
        return address_text(self.remote_host, self.remote_port)


def parse_forward(text: str) -> Forward:
    """Return what ``[LOCAL:]REMOTE`` means: ``80``, ``8080:80``, ``:80``, ``8080:10.0.0.7:80``, ``0:[::1]:80``.

    Without LOCAL it is the same port; an empty one, or 0, is any that is free.

    Raises:
        InvalidRequest: it means nothing.
    """
    words, host = text, LOCALHOST
    if "[" in text:
        words, _, rest = text.partition("[")
        inside, closed, port = rest.partition("]")
        if not words.endswith(":") or not closed or not port.startswith(":"):
            raise InvalidRequest(f"{text!r} is no forward. Write LOCAL:[ADDRESS]:PORT, as in 8080:[::1]:80.")
        local, host, remote = words[:-1], checked_host(inside), port[1:]
    else:
        match text.split(":"):
            case [remote]:
                local = remote
            case [local, remote]:
                pass
            case [local, address, remote]:
                host = checked_host(address)
            case _:
                raise InvalidRequest(f"{text!r} is no forward. Write [LOCAL:]REMOTE, as in 8080:80.")
    local_port = ANY if local in ("", "0") else checked_port(local)
    return Forward(local_port=local_port, remote_port=checked_port(remote), remote_host=host)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """A socket that listens for connections of *forward*."""

    socket: socket.socket
    forward: Forward

    @property
    def address(self) -> str:
        """The address of this machine."""
        return str(self.socket.getsockname()[0])

    @property
    def port(self) -> int:
        """The port of this machine."""
        return int(self.socket.getsockname()[1])

    @property
    def text(self) -> str:
        """Address and port, for people."""
        return address_text(self.address, self.port)


def address_text(host: str, port: int) -> str:
    """Return address and port as one writes them: ``127.0.0.1:80``, ``[::1]:80``."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextlib.contextmanager
def listening(forwards: Iterable[Forward], addresses: Iterable[str] = LOOPBACK) -> Iterator[list[Listening]]:
    """Listen for all *forwards* on all *addresses*, or on none at all.

    Of the two loopback addresses, one that this machine has not is left out.

    Raises:
        Conflict: a port is in use.
        InvalidRequest: it may not be listened on, or the address is not this machine's.
    """
    addresses = tuple(addresses)
    with contextlib.ExitStack() as stack:
        yield [listening for forward in forwards for listening in _listen(forward, addresses, stack)]


def _listen(forward: Forward, addresses: tuple[str, ...], stack: contextlib.ExitStack) -> list[Listening]:
    for left in range(_TRIES, -1, -1):
        found: list[socket.socket] = []
        address, port = "", forward.local_port
        try:
            for address in addresses:
                try:
                    found.append(_bound(address, port))
                except OSError as error:
                    absent = error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
                    if absent and addresses == LOOPBACK and (found or address != addresses[-1]):
                        continue
                    raise
                port = found[0].getsockname()[1]
        except OSError as error:
            for sock in found:
                sock.close()
            if forward.local_port == ANY and found and left and error.errno == errno.EADDRINUSE:
                continue  # free on one address, taken on the other
            raise _refusal(error, address, port, forward) from error
        except BaseException:
            for sock in found:
                sock.close()
            raise
        return [Listening(socket=stack.enter_context(sock), forward=forward) for sock in found]
    raise AssertionError("the last try has raised")


def _bound(address: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, port))
        sock.listen(128)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _refusal(error: OSError, address: str, port: int, forward: Forward) -> NoidError:
    where = address_text(address, port)
    if error.errno == errno.EADDRINUSE:
        return Conflict(
            f"cannot listen on {where}: something on this machine does already. Take another port, "
            f"{_another(port)}:{forward.target}, or any that is free, :{forward.target}"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return InvalidRequest(
            f"cannot listen on {where}: ports below 1024 are the administrator's. Take another, "
            f"{_another(port)}:{forward.target}, or any that is free, :{forward.target}"
        )
    return InvalidRequest(f"cannot listen on {where}: {error.strerror or error}. Is the address this machine's?")


def _another(port: int) -> int:
    return port + 8000 if port < 1024 else port + 1 if port < 65535 else port - 1


class Forwarder:
    """Carries the connections that come to *listeners* to the VM *name*, each in a thread of its own.

    *on_failure* is called, by any of the threads, with what was listened on and why one connection failed.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        name: str,
        listeners: list[Listening],
        on_failure: Callable[[Listening, str], None],
    ) -> None:
        self._endpoint = endpoint
        self._name = name
        self._listeners = listeners
        self._on_failure = on_failure
        self._places = threading.BoundedSemaphore(CONNECTIONS_MAX)

    def run(self) -> NoReturn:
        """Take connections until an exception, KeyboardInterrupt for example, ends it. The process' end resets all."""
        poller = select.poll()
        by_fd = {listener.socket.fileno(): listener for listener in self._listeners}
        for fd in by_fd:
            poller.register(fd, select.POLLIN)
        while True:
            for fd, _ in poller.poll():
                self._places.acquire()
                try:
                    accepted, _ = by_fd[fd].socket.accept()
                except OSError as error:  # whoever came has left again, or there are no descriptors for now
                    self._places.release()
                    if not isinstance(error, BlockingIOError | ConnectionAbortedError):
                        self._on_failure(by_fd[fd], f"cannot take a connection: {error.strerror or error}.")
                        threading.Event().wait(0.1)
                    continue
                thread = threading.Thread(target=self._carry, args=(accepted, by_fd[fd]), daemon=True)
                thread.start()

    def _carry(self, accepted: socket.socket, listening: Listening) -> None:
        try:
            with accepted:
                self._connect_and_relay(accepted, listening.forward)
        except LocalGone:
            pass  # whoever came has left; the guest's end was reset, so it knows
        except (NoidError, OSError) as error:
            self._on_failure(listening, str(error))
        finally:
            self._places.release()

    def _connect_and_relay(self, accepted: socket.socket, forward: Forward) -> None:
        local, link = SocketEnd(accepted), Link(self._endpoint, Blocking())
        stream = finished(PortStream.open(link, self._name, forward.remote_port, forward.remote_host))
        try:
            finished(relay(link, stream, local))
            local.finish()
        finally:
            stream.close()
