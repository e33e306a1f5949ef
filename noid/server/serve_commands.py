"""``noid-server serve``, which runs the agent, and ``plugins``, which says what it is made of."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from pathlib import Path

import click

from noid.errors import ConfigError
from noid.server.command import config_options, examples, run

logger = logging.getLogger(__name__)


@click.command(
    epilog=examples("noid-server serve --config /etc/noid/server.toml", "noid-server serve --local --data-dir /tmp/try")
)
@config_options
@click.option("--local", is_flag=True, help="Listen on the unix socket only.")
@click.option("--ready-fd", type=int, metavar="N", help='Write "ready" to this file descriptor once listening.')
def serve(config_path: Path | None, data_dir: Path | None, local: bool, ready_fd: int | None) -> None:
    """Run the agent and serve it.

    In the foreground, until SIGTERM or Ctrl+C. VMs keep running afterwards.
    """
    if ready_fd is not None:
        try:
            os.set_inheritable(ready_fd, False)  # or every VM would keep the pipe open
        except OSError as error:
            raise ConfigError(f"--ready-fd {ready_fd} is not an open file descriptor.") from error
    from noid.server.listening import has_terminal

    if not has_terminal():  # whoever asks to reload before there is anything to reload must not end it
        signal.signal(signal.SIGHUP, lambda *_: None)
    from noid.core.config.reading import load_config
    from noid.core.config.settings import Config, LoggingConfig
    from noid.core.opening import open_agent
    from noid.core.plugins import Plugins
    from noid.server.logformat import set_up
    from noid.server.notify import Notifier
    from noid.server.serve import serve as serve_agent

    set_up(LoggingConfig())
    config = load_config(config_path, data_dir=data_dir, local=local)
    set_up(config.logging)
    source = config.source.absolute() if config.source else "no file"
    logger.info("configuration: %s; data: %s", source, config.data_dir)
    for note in config.notes:
        logger.warning("%s: %s", config.source, note)

    def ready() -> None:
        if ready_fd is not None:
            with contextlib.suppress(BrokenPipeError), os.fdopen(ready_fd, "w") as pipe:  # nobody waits any more
                pipe.write("ready\n")

    def read_config() -> Config:
        return load_config(config.source or config_path, data_dir=data_dir, local=local)

    notifier = Notifier(os.environ)

    async def job() -> None:
        async with notifier.watched(), open_agent(config, Plugins()) as agent:
            await serve_agent(agent, config, ready=ready, notifier=notifier, read_config=read_config)

    run(job)


@click.command(epilog=examples("noid-server plugins"))
def plugins() -> None:
    """List installed plugins.

    What each implements, and why one cannot be loaded.
    """
    from noid.core.plugins import Plugins

    for plugin in Plugins().loaded:
        state = f"cannot be imported: {plugin.error}" if plugin.error else ", ".join(plugin.hooks)
        click.echo(f"{plugin.name:<20} {plugin.distribution} {plugin.version:<12} {state}")
