"""Which agent to talk to and which VM is meant: options, environment, ``config.toml``, the marker file, in that order.

`choose_endpoint` is the whole rule. A token is only ever sent to the server it was given for.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from noid.core import paths
from noid.errors import ConfigError, InvalidRequest

MARKERS = (".noid-vm", ".noid")
"""Files that name a directory's VM. The second is what old versions wrote; ``~/.noid`` is a directory and not meant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where an agent is. Either *url*, http(s) without a trailing slash, or *socket_path* is set.

    *data_dir* is set for this user's own agent, which is started when it does not run.
    """

    url: str | None = None
    token: str | None = field(default=None, repr=False)
    socket_path: Path | None = None
    data_dir: Path | None = None

    @property
    def address(self) -> str:
        """What to show, and what ``--server`` accepts."""
        return self.url or f"unix://{self.socket_path}"


def choose_endpoint(*, local: bool = False, server: str | None = None) -> Endpoint:
    """Return the agent to talk to: ``--local``, ``--server``, ``NOID_URL``, config file, else the local agent.

    ``NOID_TOKEN`` is the token for whichever server that is; the config file's token only for the config file's URL.

    Raises:
        ConfigError: the config file cannot be read or is not what it should be.
        InvalidRequest: a URL is none.
    """
    if local:
        return _local()
    token = os.environ.get("NOID_TOKEN") or None
    if token is not None:
        token = checked_token(token)
    asked_for = server or os.environ.get("NOID_URL")
    if asked_for and asked_for.startswith("unix://"):
        return Endpoint(socket_path=Path(asked_for.removeprefix("unix://")), token=token)
    asked_for = normalised_url(asked_for) if asked_for else None
    if asked_for and token:
        return Endpoint(url=asked_for, token=token)
    saved = load_server()
    if saved is None:
        return Endpoint(url=asked_for) if asked_for else _local()
    url, saved_token = saved
    if asked_for and asked_for != url:
        return Endpoint(url=asked_for)
    return Endpoint(url=url, token=token or saved_token)


def _local() -> Endpoint:
    data_dir = paths.data_dir()
    return Endpoint(socket_path=paths.socket_path(data_dir), data_dir=data_dir)


def normalised_url(url: str) -> str:
    """Return *url* without surrounding blanks and trailing slashes. A path prefix is kept; no port is added.

    Raises:
        InvalidRequest: it is no http or https URL with a host.
    """
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


# --- config.toml ----------------------------------------------------------------------------------------------------


def config_path() -> Path:
    """Return where the config file is or would be: ``config.toml`` in the data directory, ``~/.noid`` by default."""
    return paths.data_dir() / "config.toml"


def load_server() -> tuple[str, str] | None:
    """Return URL and token from the config file, or None if there is no file or no ``[server]`` in it.

    Raises:
        ConfigError: names the file, and line and column if it is not TOML.
    """
    path = config_path()
    config = _parsed(path, _text(path))
    if "server" not in config:
        return None
    match config["server"]:
        case {"url": str(url), "token": str(token)}:
            try:
                return normalised_url(url), checked_token(token)
            except InvalidRequest as error:
                raise ConfigError(f"{path}: {error}") from error
    raise ConfigError(
        f"{path}: [server] needs two strings, url and token. Run: noid auth setup --url URL --token TOKEN"
    )


def save_server(url: str, token: str) -> Path:
    """Write *url* and *token* as ``[server]`` of the config file, readable by its owner alone, and return its path.

    Whatever else the file says stays. The old file is whole until the new one replaces it.

    Raises:
        ConfigError: the present file is broken, or the new one cannot be written.
    """
    path = config_path()
    text = _text(path)
    others = {key: value for key, value in _parsed(path, text).items() if key != "server"}
    kept = _without_server_table(text)
    new = f"{kept}\n" * bool(kept) + f'[server]\nurl = "{_quoted(url)}"\ntoken = "{_quoted(token)}"\n'
    if _parsed(path, new) != others | {"server": {"url": url, "token": token}}:
        raise ConfigError(f"{path} is written in a way that cannot be edited safely. Put url and token into [server].")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = path.with_name(f".config-{os.urandom(4).hex()}")
        try:
            with open(temporary, "x", encoding="utf-8", opener=_owner_only) as file:
                file.write(new)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}. The old settings still hold.") from error
    return path


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}. Repair or remove it, or use --local.") from error


def _parsed(path: Path, text: str) -> dict[str, Any]:
    if not text:
        return {}
    import tomllib  # 10 ms that a machine without a config file does not pay

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is broken: {error}. Repair or remove it, or use --local.") from error


def _without_server_table(text: str) -> str:
    """Return *text* without the lines of its ``[server]`` table. The caller verifies the outcome by parsing it."""
    kept = []
    inside = False
    for line in text.splitlines():
        header = line.split("#")[0].strip()
        if header.startswith("["):
            inside = header.replace(" ", "") == "[server]"
        if not inside:
            kept.append(line)
    return "\n".join(kept).rstrip("\n") + "\n" * bool(kept)


def _owner_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _quoted(value: str) -> str:
    return "".join(
        f"\\u{ord(c):04x}" if c < " " or c == "\x7f" else "\\" + c if c in '"\\' else c  # TOML basic strings
        for c in value
    )


# --- the directory's VM -----------------------------------------------------------------------------------------------


def active_vm(directory: Path | None = None) -> tuple[str, Path] | None:
    """Return the VM the working directory (or *directory*) is bound to and the file that says so, or None.

    Raises:
        ConfigError: the file is there and cannot be read.
    """
    for marker in MARKERS:
        path = (directory or Path()) / marker
        try:
            name = path.read_text(encoding="utf-8").strip()
        except (FileNotFoundError, IsADirectoryError):
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {path.absolute()}: {error}. Pass the VM's name instead.") from error
        if name:
            return name, path
    return None


def set_active_vm(name: str, directory: Path | None = None) -> Path:
    """Bind the working directory (or *directory*) to the VM *name* and return the file that says so.

    Raises:
        ConfigError: it cannot be written.
    """
    path = (directory or Path()) / MARKERS[0]
    try:
        path.write_text(f"{name}\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path.absolute()}: {error.strerror or error}.") from error
    return path
