"""This user's own agent: found at its socket, started when it does not run.

It is started detached, in a session of its own, and says ``ready`` on a pipe once it listens. A lock makes commands
that start at once start one agent; an agent started by other means in the same moment is simply used.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import sys
import time
from pathlib import Path

from noid.client.errors import ConnectionFailed
from noid.client.sockets import connect_unix
from noid.core import paths
from noid.errors import ConfigError

READY_SECS = 30.0
ENDING_SECS = 5.0
LOG_NAME = "agent.log"
LOG_LINES_SHOWN = 8
FREE_BYTES_MIN = 1 << 16
MEANT_FOR_CLIENTS = ("NOID_SERVER", "NOID_TOKEN", "NOID_URL")


def connect(data_dir: Path) -> socket.socket:
    """Return a connection to the agent that owns *data_dir*, starting it if none listens.

    Raises:
        ConfigError: it cannot be started; the message carries its last words.
        ConnectionFailed: it was started and still does not answer.
    """
    sock = _connected(data_dir)
    if sock is not None:
        return sock
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        run_dir = paths.private_directory(paths.run_dir(data_dir))
        lock = os.open(run_dir / "start.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(
            f"cannot use {data_dir} for a local agent: {error.strerror or error}. Choose another NOID_DATA_DIR."
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever holds it is done within READY_SECS
        sock = _connected(data_dir)
        if sock is not None:
            return sock
        failure = _start(data_dir)
        sock = _connected(data_dir)
    finally:
        os.close(lock)
    if sock is None:
        raise failure or ConnectionFailed(
            f"the local agent said it is ready and cannot be reached. See {data_dir / LOG_NAME}."
        )
    return sock


def _connected(data_dir: Path) -> socket.socket | None:
    """Return a connection, or None if nobody listens.

    Raises:
        ConfigError: somebody else could have made the socket.
        ConnectionFailed: there is an agent and it does not accept.
    """
    path = paths.socket_path(data_dir)
    try:
        paths.check_private(path.parent)
        return connect_unix(str(path))
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        return None
    except OSError as error:
        raise ConnectionFailed(
            f"the local agent does not accept connections on {path}: {error.strerror or error}."
            f" See {data_dir / LOG_NAME}."
        ) from error


def _start(data_dir: Path) -> ConfigError | None:
    """Start an agent and wait until it is ready. Return why it ended instead: another one may have won, or it failed.

    Raises:
        ConfigError: it cannot be started here, or is not ready in `READY_SECS`.
    """
    program = server_program()
    from subprocess import DEVNULL, Popen, TimeoutExpired  # 10 ms that only the first command pays

    log_path = data_dir / LOG_NAME
    environment = {key: value for key, value in os.environ.items() if key not in MEANT_FOR_CLIENTS}
    readable, writable = os.pipe()
    try:
        with open(log_path, "ab", opener=_owner_only) as log:
            said_before = log.seek(0, os.SEEK_END)
            command = [*program, "serve", "--local", "--data-dir", str(data_dir)]
            agent = Popen(
                [*command, "--ready-fd", str(writable)],
                stdin=DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=environment,
                pass_fds=(writable,),
                start_new_session=True,
            )
        os.close(writable)
        writable = -1
        word = _first_word(readable)
    except OSError as error:
        raise ConfigError(f"cannot start a local agent in {data_dir}: {error.strerror or error}.") from error
    finally:
        os.close(readable)
        if writable >= 0:
            os.close(writable)
    last_words = _last_lines(log_path, said_before)
    if word == b"":
        try:
            status = agent.wait(ENDING_SECS)  # the pipe's other end is closed, so it has ended or is about to
        except TimeoutExpired:
            agent.returncode = 0  # as below
            raise ConfigError(f"the local agent (process {agent.pid}) gave up and does not end.{last_words}") from None
        return ConfigError(f"the local agent cannot start (status {status}).{last_words}")
    agent.returncode = 0  # it outlives us by intent; without this Popen warns about a process left behind
    if word is None:
        raise ConfigError(
            f"the local agent (process {agent.pid}) is not ready after {READY_SECS:.0f} s."
            f" It goes on trying: wait and repeat, or end it with: kill {agent.pid}.{last_words}"
        )
    return None


def _first_word(descriptor: int) -> bytes | None:
    """Return the line written to the pipe, empty if it was closed without one, None if it took too long."""
    deadline = time.monotonic() + READY_SECS
    word = b""
    while not word.endswith(b"\n"):
        readable, _, _ = select.select([descriptor], [], [], max(deadline - time.monotonic(), 0))
        if not readable:
            return None
        data = os.read(descriptor, 64)
        if not data:
            return b""
        word += data
    return word


def server_program() -> list[str]:
    """Return what runs ``noid-server`` here: of this installation, else the one on ``PATH``.

    Raises:
        ConfigError: there is none. Says what to install, or what to do instead.
    """
    from importlib.util import find_spec

    needed = ("hypercorn", "quart_trio", "sqlite_utils", "noid.server")  # the last one is not in a single file
    missing = [name for name in needed if find_spec(name) is None]
    if not missing:
        return [sys.executable, "-m", "noid.server"]
    from shutil import which

    program = which("noid-server")
    if program is None or Path(program).parent == Path(sys.executable).parent:  # or it would be this one
        raise ConfigError(
            f"only the client is installed here ({', '.join(missing)} missing), so no local agent can be started."
            f" {_how_to_install()}, or use a server: noid auth setup"
        )
    return [program]


def _how_to_install() -> str:
    from noid.client.installation import find

    kind = find().kind
    if kind == "single file":
        return "Install noid[server] as a package, whose noid-server is used when it is on PATH"
    if kind in ("uv tool", "uvx", "pipx", "pipx run"):
        return f"Install it by {kind} as noid[server], from where this one came"
    return "Run: pip install 'noid[server]'"


def _last_lines(log_path: Path, offset: int) -> str:
    try:
        with log_path.open("rb") as log:
            log.seek(max(offset, log.seek(0, os.SEEK_END) - 8192))
            lines = log.read().decode("utf-8", "replace").strip().splitlines()[-LOG_LINES_SHOWN:]
    except OSError as error:
        return f" Its log {log_path} cannot be read: {error.strerror or error}."
    if not lines:
        facts = os.statvfs(log_path.parent)
        full = f" The disk of {log_path.parent} is full: free space there and try again."
        return full if facts.f_bavail * facts.f_frsize < FREE_BYTES_MIN else f" It wrote nothing to {log_path}."
    if lines[-1].startswith("Error: "):
        return f" {lines[-1].removeprefix('Error: ')} Its log is {log_path}."
    return "\n".join(["", f"Its last words in {log_path}:", *(f"    {line}" for line in lines)])


def _owner_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
