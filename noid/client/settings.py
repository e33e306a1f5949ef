"""Which agent to talk to and which VM is meant: options, environment, ``config.toml``, the marker file, in that order.

`choose_endpoint` is the whole rule. Where nothing is configured it reads no file and imports next to nothing: that is
asked by every command.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from noid.core import paths
from noid.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

MARKERS = (".noid-vm", ".noid")
"""Files that name a directory's VM. The second is what old versions wrote; ``~/.noid`` is a directory and not meant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where an agent is. Either *url*, http(s) without a trailing slash, or *socket_path* is set.

    *data_dir* is set for this user's own agent, which is started when it does not run.
    """

    url: str | None = None
    token: str | None = field(default=None, repr=False)
    socket_path: str | None = None
    data_dir: str | None = None

    @property
    def address(self) -> str:
        """What to show, and what ``--server`` accepts."""
        return self.url or f"unix://{self.socket_path}"


def choose_endpoint(*, local: bool = False, server: str | None = None) -> Endpoint:
    """Return the agent to talk to: ``--local``, ``--server``, ``NOID_SERVER``, ``NOID_URL``, config file, local agent.

    *server* and ``NOID_SERVER`` are a URL or the name of a server this user knows; ``local`` is this user's own agent.
    ``NOID_TOKEN`` is the token for whichever server that is, unless *server* names one, which has its own. A token that
    was kept goes to the URL it was kept with and nowhere else.

    Raises:
        ConfigError: a config file cannot be read or is not what it should be.
        InvalidRequest: a URL is none.
        NotFound: there is no server of that name.
    """
    asked_for = server or os.environ.get("NOID_SERVER") or os.environ.get("NOID_URL")
    if local or (not asked_for and not os.environ.get("NOID_TOKEN") and _nothing_is_configured()):
        return _local()
    from noid.client import servers
    from noid.client.servers import checked_token, normalised_url

    given = os.environ.get("NOID_TOKEN") or None
    token = None if given is None else checked_token(given)
    if not asked_for:
        current = servers.in_use()
        return _local() if current is None else Endpoint(url=current.url, token=token or current.token)
    if asked_for.startswith("unix://"):
        return Endpoint(socket_path=asked_for.removeprefix("unix://"), token=token)
    if asked_for == servers.LOCAL:
        return _local()
    if "://" not in asked_for and asked_for != os.environ.get("NOID_URL"):
        named = servers.with_name(asked_for)
        return Endpoint(url=named.url, token=named.token if server or token is None else token)
    url = normalised_url(asked_for)
    if token is None:
        found = servers.with_url(url)
        token = None if found is None else found.token
    return Endpoint(url=url, token=token)


def _local() -> Endpoint:
    data_dir = paths.data_dir_text()
    return Endpoint(socket_path=paths.socket_path_text(data_dir), data_dir=data_dir)


def _nothing_is_configured() -> bool:
    try:
        os.stat(os.path.join(paths.data_dir_text(), "config.toml"))  # noqa: PTH116, PTH118  # as in noid.core.paths
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # whoever reads it says what is wrong
        return False
    return False


# --- the directory's VM -----------------------------------------------------------------------------------------------


def active_vm(directory: Path | None = None) -> tuple[str, Path] | None:
    """Return the VM the working directory (or *directory*) is bound to and the file that says so, or None.

    Raises:
        ConfigError: the file is there and cannot be read.
    """
    from pathlib import Path

    for marker in MARKERS:
        path = (directory or Path()) / marker
        try:
            name = path.read_text(encoding="utf-8").strip()
        except (FileNotFoundError, IsADirectoryError):
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {_absolute(path)}: {error}. Pass the VM's name instead.") from error
        if name:
            return name, path
    return None


def set_active_vm(name: str, directory: Path | None = None) -> Path:
    """Bind the working directory (or *directory*) to the VM *name* and return the file that says so.

    Raises:
        ConfigError: it cannot be written.
    """
    from pathlib import Path

    path = (directory or Path()) / MARKERS[0]
    try:
        path.write_text(f"{name}\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {_absolute(path)}: {error.strerror or error}.") from error
    return path


def _absolute(path: Path) -> Path:
    """Return *path* for a message: absolute, unless the working directory is gone."""
    try:
        return path.absolute()
    except OSError:
        return path
