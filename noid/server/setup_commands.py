"""``noid-server check-config`` and ``systemd-unit``: what there is to do before a server is started."""

from __future__ import annotations

import importlib.resources
import sys
from pathlib import Path

import click

from noid.server.command import config_options, examples

_STATE = "StateDirectory=noid\nStateDirectoryMode=0700\n"  # in the unit: systemd makes /var/lib/noid


@click.command("check-config", epilog=examples("noid-server check-config --config /etc/noid/server.toml"))
@config_options
def check_config(config_path: Path | None, data_dir: Path | None) -> None:
    """Say whether a server could start with this configuration.

    Nothing is started or changed. What is wrong is said as at a start, with exit status 1.
    """
    from noid.core.config.reading import load_config
    from noid.core.plugins import Plugins
    from noid.server import tls
    from noid.server.listening import split_address

    config = load_config(config_path, data_dir=data_dir)
    for note in config.notes:
        click.echo(f"Note: {note}", err=True)
    Plugins().check(config)
    split_address(config.listen)
    scheme = "http" if tls.load(config.tls) is None else "https"
    backends = config.backends
    click.echo(f"configuration  {config.source or 'none: everything is at its default'}")
    click.echo(f"data           {config.data_dir}")
    click.echo(f"listen         {scheme}://{config.listen}")
    click.echo(
        f"backends       vmm {backends.vmm}, storage {backends.storage}, exec {' '.join(backends.exec)}, "
        f"network {backends.network}, auth {backends.auth}"
    )


@click.command("systemd-unit", epilog=examples("noid-server systemd-unit > /etc/systemd/system/noid.service"))
@config_options
def systemd_unit(config_path: Path | None, data_dir: Path | None) -> None:
    """Print a hardened unit for systemd.

    It starts this program as the user noid, with /etc/noid/server.toml unless told otherwise. That may write to where
    its data is: /var/lib/noid, or what the file says, if it is there already.
    """
    from noid.core.config.reading import SYSTEM_DATA_DIR, SYSTEM_FILE, load_config

    text = importlib.resources.files("noid.server").joinpath("noid.service").read_text()
    source = (config_path or SYSTEM_FILE).absolute()
    options = f"--config {source}"
    data = SYSTEM_DATA_DIR
    if data_dir is not None:
        data = data_dir.absolute()
        options += f" --data-dir {data}"
    elif source.exists():
        data = load_config(source).data_dir
    if data != SYSTEM_DATA_DIR:
        text = text.replace(_STATE, f"ReadWritePaths={data}\n")
    program = Path(sys.executable).with_name("noid-server")
    click.echo(text.replace("@PROGRAM@", str(program)).replace("@OPTIONS@", options), nl=False)
