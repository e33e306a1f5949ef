"""Asking the server that runs on a data directory, from a command on the same host: over its unix socket."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any

from noid import errors
from noid.core import paths
from noid.core.config.settings import Config
from noid.errors import DependencyDown, NoidError


class _Connection(http.client.HTTPConnection):
    """HTTP over the unix socket *path*."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))


def ask(config: Config, method: str, path: str) -> Any:
    """Return what the running server answers, or None where none runs. Blocks until it has answered.

    Raises:
        NoidError: what the server says; of the class that has its code.
        DependencyDown: the server went away before it had answered.
    """
    try:
        paths.check_private(config.run_dir)
        connection = _Connection(config.socket_path)
        connection.connect()
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    try:
        connection.request(method, path)
        reply = connection.getresponse()
        body = json.loads(reply.read() or b"null")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DependencyDown(f"the running server has not answered: {error!r}. Look at its log and repeat.") from error
    finally:
        connection.close()
    if reply.status >= 400:
        raise _error(body)
    return body


def _error(body: Any) -> NoidError:
    known = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, NoidError)]
    kind = next((kind for kind in known if kind.code == body["code"]), NoidError)
    error = kind.__new__(kind)
    NoidError.__init__(error, body["error"])
    return error
