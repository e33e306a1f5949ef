"""The servers this user knows, by name, with their tokens; and which of them is in use.

``config.toml`` says in ``[server]`` which one is in use, as the predecessor's client reads and writes it. That client
forgets everything else in the file, so the names, and the tokens of those that are not in use, are in ``servers.toml``,
a table for each. Which of these is the one in use is told by URL and token; one that somebody else wrote into
``config.toml`` gets a name as soon as it would be lost otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noid.client import config_file
from noid.core import paths
from noid.errors import ConfigError, Conflict, InvalidRequest, NotFound

if TYPE_CHECKING:
    from tomlkit import TOMLDocument

LOCAL = "local"
"""What this user's own agent is called. No server can have that name."""

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server and the token for it. *name* is empty for the one in use as long as it has none."""

    name: str = ""
    url: str
    token: str = field(repr=False)

    def is_same(self, other: Server | None) -> bool:
        """Return whether that is the same server with the same token, whatever they are called."""
        return other is not None and (self.url, self.token) == (other.url, other.token)


def config_path() -> Path:
    """Return where the config file is or would be: ``config.toml`` in the data directory, ``~/.noid`` by default."""
    return paths.data_dir() / "config.toml"


def names_path() -> Path:
    """Return where all servers with their names are or would be: ``servers.toml`` beside the config file."""
    return paths.data_dir() / "servers.toml"


def normalised_url(url: str) -> str:
    """Return *url* without surrounding blanks and trailing slashes. A path prefix is kept; no port is added.

    Raises:
        InvalidRequest: it is no http or https URL with a host.
    """
    from urllib.parse import urlsplit  # 2 ms that the local agent does not cost

    url = url.strip().rstrip("/")
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        fine = fine and not (parts.query or parts.fragment or parts.username)
        url.encode("ascii")
    except ValueError:  # a port that is no number, brackets that do not close, a host that is not ASCII
        fine = False
    if not fine or any(character <= " " for character in url):
        raise InvalidRequest(f"{url!r} is not a server URL. It looks like https://host or http://host:7654.")
    return url


def checked_token(token: str) -> str:
    """Return *token* if it can be sent.

    Raises:
        InvalidRequest: it is empty or has characters that no token has. The message does not repeat it.
    """
    if not token or not token.isascii() or any(not "!" <= character <= "~" for character in token):
        raise InvalidRequest("the token is empty or has characters no token has. Was it copied completely?")
    return token


def checked_server_name(name: str) -> str:
    """Return *name* if a server can be called that.

    Raises:
        InvalidRequest: it cannot.
    """
    if name == LOCAL:
        raise InvalidRequest(f"{LOCAL!r} is this user's own agent. Choose another name for a server.")
    if not re.fullmatch(_NAME, name):
        raise InvalidRequest(
            f"{name!r} cannot be a server's name. It has 1 to 64 characters of A-Z a-z 0-9 . _ - and begins with a "
            "letter or a digit."
        )
    return name


# --- reading ---------------------------------------------------------------------------------------------------------


def in_use() -> Server | None:
    """Return the server of the config file, without its name, or None if that names none.

    Raises:
        ConfigError: names the file, and line and column if it is not TOML.
    """
    path = config_path()
    return _server_in(path, config_file.read(path))


def known() -> list[Server]:
    """Return all servers in the order they came; one in use that has no name is the last, under the one it would get.

    Raises:
        ConfigError: one of the files cannot be read or is not what it should be.
    """
    path = names_path()
    return _with_the_nameless(_named_in(path, config_file.read(path)), in_use())


def with_name(name: str) -> Server:
    """Return the server called *name*.

    Raises:
        NotFound: there is none; the message says which there are.
        ConfigError: as of `known`.
    """
    return _called(name, known())


def with_url(url: str) -> Server | None:
    """Return the server at *url*, which is normalised: the one in use, else the only one there.

    Raises:
        InvalidRequest: there are several, as different users.
        ConfigError: as of `known`.
    """
    current = in_use()
    if current is not None and current.url == url:
        return current
    found = [server for server in known() if server.url == url]
    if len(found) > 1:
        names = ", ".join(server.name for server in found)
        raise InvalidRequest(f"{url} is known under several names with different tokens: {names}. Give one of these.")
    return found[0] if found else None


def exposed() -> list[Path]:
    """Return those of our files that other users of this machine can read, although a token may be in them."""
    found = []
    for path in (config_path(), names_path()):
        try:
            mode = path.stat().st_mode
        except OSError:
            continue  # whoever reads it says what is wrong with it
        if mode & 0o077:
            found.append(path)
    return found


# --- changing --------------------------------------------------------------------------------------------------------


def remember(url: str, token: str, name: str | None = None) -> Server:
    """Keep *token* for the server at *url*, use that from now on and return it.

    Called *name*; without one, as before if that URL is known, else by its host.

    Raises:
        Conflict: another server has that name. Nothing was changed.
        InvalidRequest: as of `with_url`, `normalised_url`, `checked_token`, `checked_server_name`.
        ConfigError: a file is broken or cannot be written. The old settings still hold.
    """
    url, token = normalised_url(url), checked_token(token)
    if name is not None:
        checked_server_name(name)
    with _changing() as files:
        server = Server(name=name or _name_for(url, files.servers, files.current), url=url, token=token)
        others = [other for other in files.servers if other.name != server.name]
        for other in files.servers:
            if other.name == server.name and other.url != url:
                raise Conflict(
                    f"{name!r} is already the name of {other.url}. Choose another one, or run: noid auth logout {name}"
                )
        files.write([*others, server], server)
    return server


def switch(name: str) -> Server | None:
    """Use the server called *name* from now on and return it; for `LOCAL` none, which is this user's own agent.

    Raises:
        NotFound: no server is called that. Nothing was changed.
        ConfigError: a file is broken or cannot be written. The old settings still hold.
    """
    with _changing() as files:
        server = None if name == LOCAL else _called(name, files.servers)
        files.write(files.servers, server)
    return server


def forget(name: str) -> bool:
    """Remove the server called *name* with its token. Return whether it was the one in use; then none is.

    Raises:
        NotFound: no server is called that. Nothing was changed.
        ConfigError: a file is broken or cannot be written. The old settings still hold.
    """
    with _changing() as files:
        doomed = _called(name, files.servers)
        was_in_use = doomed.is_same(files.current)
        files.write([other for other in files.servers if other != doomed], None if was_in_use else files.current)
    return was_in_use


# --- what the files say ----------------------------------------------------------------------------------------------


class _Files:
    """Both files while they are changed: what they said, and the documents that become the new ones."""

    def __init__(self, config: TOMLDocument, names: TOMLDocument) -> None:
        self._config = config
        self._names = names
        self.current = _server_in(config_path(), config)
        self.servers = _with_the_nameless(_named_in(names_path(), names), self.current)

    def write(self, servers: list[Server], current: Server | None) -> None:
        for name in self._names.keys() - {server.name for server in servers}:
            del self._names[name]
        for server in servers:
            _fill(self._names, server.name, server)
        if current is None:
            self._config.pop("server", None)
        else:
            _fill(self._config, "server", current)


@contextmanager
def _changing() -> Iterator[_Files]:
    """Let the block change both files. The names are written first, so that no token is ever in neither."""
    config, names = config_path(), names_path()
    with (
        config_file.alone_in(config.parent),
        config_file.changed(config) as config_document,
        config_file.changed(names) as names_document,
    ):
        yield _Files(config_document, names_document)


def _fill(document: TOMLDocument, section: str, server: Server) -> None:
    import tomlkit

    if section not in document:
        document[section] = tomlkit.table()
    table: Any = document[section]
    for key, value in (("url", server.url), ("token", server.token)):
        if table.get(key) != value:
            table[key] = value


def _server_in(path: Path, config: Mapping[str, Any]) -> Server | None:
    if "server" not in config:
        return None
    return _checked(path, "server", config["server"])


def _named_in(path: Path, tables: Mapping[str, Any]) -> list[Server]:
    return [_checked(path, name, table, name=name) for name, table in tables.items()]


def _checked(path: Path, section: str, table: object, name: str = "") -> Server:
    match table:
        case {"url": str(url), "token": str(token)}:
            try:
                # Not strings of tomlkit, which remember where they came from.
                return Server(name=name, url=normalised_url(str(url)), token=checked_token(str(token)))
            except InvalidRequest as error:
                raise ConfigError(f"{path}: [{section}]: {error}") from error
    raise ConfigError(f"{path}: [{section}] needs two strings, url and token. Run: noid auth setup")


def _with_the_nameless(servers: list[Server], current: Server | None) -> list[Server]:
    if current is None or any(server.is_same(current) for server in servers):
        return servers
    name = _free_name(current.url, {server.name for server in servers})
    return [*servers, Server(name=name, url=current.url, token=current.token)]


def _called(name: str, servers: list[Server]) -> Server:
    for server in servers:
        if server.name == name:
            return server
    names = ", ".join([*(server.name for server in servers), LOCAL])
    raise NotFound(f"no server is called {name!r}. There are: {names}. Another one is added by: noid auth setup")


def _name_for(url: str, servers: list[Server], current: Server | None) -> str:
    """Return what the server at *url*, for which no name was given, is called among *servers*."""
    there = [server for server in servers if server.url == url]
    for server in there:
        if len(there) == 1 or server.is_same(current):
            return server.name
    if there:
        names = ", ".join(server.name for server in there)
        raise InvalidRequest(f"{url} is known under several names: {names}. Say which one is meant, with --as NAME.")
    return _free_name(url, {server.name for server in servers})


def _free_name(url: str, taken: set[str]) -> str:
    """Return the host's name, with its port and then a number where that is *taken*."""
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    host = re.sub(r"[^a-z0-9._-]", "-", parts.hostname or "").strip("-._")[:50] or "server"
    wanted = [host, *([f"{host}-{parts.port}"] if parts.port else [])]
    numbered = (f"{host}-{number}" for number in range(2, len(taken) + 4))
    return next(name for name in (*wanted, *numbered) if name not in taken and name != LOCAL)
