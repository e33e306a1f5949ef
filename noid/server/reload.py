"""Reading server.toml anew while it is served by: what may change does, what may not is named.

What is wrong changes nothing. Tokens need no reloading: each request looks them up.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any

from noid.core.agent import Agent
from noid.core.config.settings import NOT_FROM_FILE, Config
from noid.errors import ConfigError
from noid.server import tls
from noid.server.hardening import App, Settings
from noid.server.logformat import set_up

logger = logging.getLogger(__name__)

CHANGEABLE = (
    "console_timeout_secs",
    "exec_timeout_secs",
    "limits",
    "logging",
    "max_ws_sessions",
    "metrics_users",
    "quota",
    "tls",
    "trust_forwarded_for",
)
"""What of the configuration holds from the next request, connection or line in the log on."""


class Reloading:
    """Makes an *agent* and what serves it go by the configuration that *read* returns now."""

    def __init__(self, agent: Agent, app: App, settings: Settings, read: Callable[[], Config]) -> None:
        self._agent = agent
        self._app = app
        self._settings = settings
        self._read = read

    def reload(self) -> None:
        """Read the configuration and take up what may change. Whatever is wrong is logged, and changes nothing."""
        old = self._agent.config
        try:
            new = self._read()
        except ConfigError as error:
            logger.error("the configuration stays as it was: %s", error)  # noqa: TRY400  # it says what is wrong
            return
        new = self._with_tls(old, new)
        taken = {name: getattr(new, name) for name in CHANGEABLE}
        changed = sorted(key for key in _differences(old, dataclasses.replace(old, **taken)))
        fixed = sorted(key for key in _differences(dataclasses.replace(old, **taken), new))
        self.take_up(dataclasses.replace(old, **taken))
        logger.info("the configuration was read anew; changed: %s", ", ".join(changed) or "nothing")
        if fixed:
            logger.warning("changed in the file, and only a restart takes it up: %s", ", ".join(fixed))

    def take_up(self, config: Config) -> None:
        """Go by *config* from now on."""
        set_up(config.logging)
        self._agent.take_up(config)
        self._settings.take_up(config.limits)
        self._app.config["MAX_CONTENT_LENGTH"] = config.limits.max_body_bytes

    def _with_tls(self, old: Config, new: Config) -> Config:
        """Read the certificate, which may be another one in the same file, and return *new* with what is used."""
        if (old.tls.certificate is None) != (new.tls.certificate is None):
            logger.warning("only a restart switches TLS on or off; it stays as it was")
            return dataclasses.replace(new, tls=old.tls)
        if self._settings.tls is None:
            return new
        try:
            self._settings.tls = tls.load(new.tls)
        except ConfigError as error:
            logger.error("the certificate stays as it was: %s", error)  # noqa: TRY400  # the same
            return dataclasses.replace(new, tls=old.tls)
        return new


def _differences(old: Any, new: Any, section: str = "") -> Iterator[str]:
    """Yield the keys whose values differ, as a file has them: ``key`` or ``[section] key``."""
    for field in dataclasses.fields(old):
        if not section and field.name in NOT_FROM_FILE:
            continue
        before, after = getattr(old, field.name), getattr(new, field.name)
        if dataclasses.is_dataclass(before):
            yield from _differences(before, after, f"[{field.name}] ")
        elif before != after:
            yield f"{section}{field.name}"
