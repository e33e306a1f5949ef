"""Listening sockets: not inherited by any child (M), never taken from a server that lives (L)."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

from noid.core.paths import private_directory
from noid.errors import ConfigError

logger = logging.getLogger(__name__)

BACKLOG = 1024


def allow_many_files() -> None:
    """Let this process open as many files, and so connections, as its hard limit allows: the usual 1024 are few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:  # an unlimited hard limit above what the kernel gives
        logger.warning("the limit of open files stays at %d: %s", soft, error)


def has_terminal() -> bool:
    """Whether this process has a controlling terminal, and that is still there."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


@contextlib.contextmanager
def unix_listener(path: Path) -> Iterator[socket.socket]:
    """Listen on *path*, which only this user can reach (directory 0700, socket 0600), and remove it afterwards.

    A socket nobody listens on is replaced, atomically. Two servers that start at the same moment are kept apart by the
    lock on the data directory, which the agent holds before it comes here.

    Raises:
        ConfigError: somebody listens there, or it cannot be made.
    """
    beside = path.with_name(f".{os.getpid()}.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            private_directory(path.parent)
            if _answers(path):
                raise ConfigError(f"another agent is serving {path}. Stop it first, or choose another data directory.")
            beside.unlink(missing_ok=True)
            sock.bind(os.fspath(beside))
            beside.chmod(0o600)
            sock.listen(BACKLOG)
            beside.rename(path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise ConfigError(f"cannot listen on {path}: {error.strerror or error}.") from error
        sock.setblocking(False)
        ours = path.stat().st_ino
        try:
            yield sock
        finally:
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino == ours:
                    path.unlink()


@contextlib.contextmanager
def tcp_listeners(listen: str, *, secure: bool = False) -> Iterator[list[socket.socket]]:
    """Listen on every address that *listen*, ``host:port`` or ``[address]:port``, stands for.

    Warns of an address that others can reach unless the server is *secure*: has TLS.

    Raises:
        ConfigError: it cannot be understood, resolved or bound.
    """
    host, port = split_address(listen)
    with contextlib.ExitStack() as stack:
        try:
            found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except OSError as error:
            raise ConfigError(f"listen = {listen!r}: cannot resolve {host!r}: {error.strerror}.") from error
        sockets = []
        for family, kind, protocol, _, address in found:
            try:
                sock = stack.enter_context(socket.socket(family, kind, protocol))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # inherited by what it accepts
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind(address)
                sock.listen(BACKLOG)
            except OSError as error:
                if error.errno == errno.EAFNOSUPPORT and len(found) > 1:
                    continue  # a host without IPv6 whose resolver knows it nevertheless
                used = "Stop what is using the port, or choose" if error.errno == errno.EADDRINUSE else "Choose"
                hint = f"{used} another `listen` in server.toml."
                raise ConfigError(f"cannot listen on {listen}: {error.strerror or error}. {hint}") from error
            sock.setblocking(False)
            sockets.append(sock)
            if not secure and not _is_loopback(address[0]):
                logger.warning(
                    "%s IS SERVED WITHOUT ENCRYPTION: whoever is on the way can read tokens and everything else. Give "
                    "a certificate in [tls], or listen on 127.0.0.1 behind a proxy that has one",
                    listen,
                )
        yield sockets


def split_address(listen: str) -> tuple[str, int]:
    """Return host and port of ``host:port``; an IPv6 address stands in brackets.

    Raises:
        ConfigError: it is something else.
    """
    host, colon, port = listen.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ConfigError(f"listen = {listen!r} must be host:port, as in 127.0.0.1:7654 or [::1]:7654.")
    if host.startswith("[") and host.endswith("]"):
        return host[1:-1], int(port)
    if ":" in host:
        raise ConfigError(f"listen = {listen!r}: put the IPv6 address in brackets, as in [::1]:7654.")
    return host, int(port)


def _is_loopback(address: str | int) -> bool:
    return str(address).startswith("127.") or address == "::1"


def _answers(path: Path) -> bool:
    """Whether somebody listens on *path*. A full backlog counts: there is somebody, only busy."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except BlockingIOError:
            return True
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True
