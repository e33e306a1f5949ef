"""Where an agent's files are: the one rule that the agent, its clients and its tests must agree on.

Standard library only, and little of it, because every command imports this.

A unix socket path holds 107 bytes. Sockets therefore live in ``<data_dir>/run`` while ``agent.sock`` there is at most
`SOCKET_PATH_BYTES_MAX` bytes long, which leaves room for the longer names of the VMs' own sockets, and otherwise in
``/tmp/noid-<uid>/<16 hex digits of the data directory's SHA-256>``. ``/tmp`` belongs to everybody, so whoever uses a
run directory calls `private_directory` (to make it) or `check_private` (before trusting it).
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from noid.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

SOCKET_PATH_BYTES_MAX = 90
SOCKET_NAME = "agent.sock"


def data_dir() -> Path:
    """Return ``$NOID_DATA_DIR``, else ``~/.noid``; absolute. Nothing is created.

    Raises:
        ConfigError: there is neither that variable nor a home directory.
    """
    return _path(data_dir_text())


def data_dir_text() -> str:
    """Return the same as text: a command that only asks an agent imports no pathlib, which costs more than asking."""
    chosen = os.environ.get("NOID_DATA_DIR")
    if chosen:
        return os.path.abspath(os.path.expanduser(chosen))  # noqa: PTH100, PTH111  # resolve() follows links
    return os.path.join(_home_text(), ".noid")  # noqa: PTH118


def home() -> Path:
    """Return the home directory of whoever this process runs as, by ``$HOME``.

    Raises:
        ConfigError: there is none.
    """
    return _path(_home_text())


def run_dir(data_dir: Path) -> Path:
    """Return the directory of the sockets of the agent that owns *data_dir*. Nothing is created."""
    return _path(_run_dir_text(str(data_dir)))


def socket_path(data_dir: Path) -> Path:
    """Return the local socket of the agent that owns *data_dir*. Nothing is created."""
    return _path(socket_path_text(str(data_dir)))


def socket_path_text(data_dir: str) -> str:
    """Return the same as text."""
    return os.path.join(_run_dir_text(data_dir), SOCKET_NAME)  # noqa: PTH118


def private_directory(directory: Path) -> Path:
    """Make the run directory *directory* for this user alone (0700) and return it. The mode of an existing one is set.

    Raises:
        ConfigError: it, or the ``/tmp/noid-<uid>`` above it, belongs to somebody else or is not a directory.
        OSError: it cannot be made.
    """
    directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.mkdir(mode=0o700, exist_ok=True)
    check_private(directory)
    for level in map(_path, _ours_alone(str(directory))):
        if stat.S_IMODE(level.stat().st_mode) != 0o700:
            level.chmod(0o700)
    return directory


def check_private(directory: Path | str) -> None:
    """Return if the run directory *directory* is this user's own, so that nobody else can have put a socket there.

    Raises:
        ConfigError: it is not.
        FileNotFoundError: there is none.
    """
    for level in _ours_alone(str(directory)):
        facts = os.lstat(level)
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid():
            raise ConfigError(
                f"{level} is not a directory of this user (uid {os.geteuid()}), so no socket in it can be trusted."
                " Remove it, or choose another NOID_DATA_DIR."
            )


def _home_text() -> str:
    # Path.home() raises RuntimeError where this says "~"; an empty HOME would be the root directory.
    found = os.path.expanduser("~") if os.environ.get("HOME", "~") else ""  # noqa: PTH111
    if not os.path.isabs(found):  # noqa: PTH117
        raise ConfigError("there is no home directory to keep data in. Set HOME or NOID_DATA_DIR.")
    return found


def _run_dir_text(data_dir: str) -> str:
    beside = os.path.join(data_dir, "run")  # noqa: PTH118
    if len(os.fsencode(os.path.join(beside, SOCKET_NAME))) <= SOCKET_PATH_BYTES_MAX:  # noqa: PTH118
        return beside
    from hashlib import sha256  # loads OpenSSL: only for who needs it

    return os.path.join(_short_parent(), sha256(os.fsencode(data_dir)).hexdigest()[:16])  # noqa: PTH118


def _ours_alone(directory: str) -> tuple[str, ...]:
    above = os.path.dirname(directory)  # noqa: PTH120
    return (above, directory) if above == _short_parent() else (directory,)


def _short_parent() -> str:
    return f"/tmp/noid-{os.geteuid()}"  # noqa: S108  # whoever uses it checks whose it is


def _path(text: str) -> Path:
    from pathlib import Path

    return Path(text)
