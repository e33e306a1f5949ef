"""``noid config``: what this user has set for the command line, and the predecessor's kernel and rootfs."""

from __future__ import annotations

import json
import subprocess

import click

from noid.cli.options import Group, command, confirmed, with_yes
from noid.cli.output import printable, show, table
from noid.client import local, preferences
from noid.client.settings import choose_endpoint
from noid.core import paths
from noid.errors import BackendError, NotFound

IMAGE = "default"
MADE_OF = ("kernel", "rootfs")
DESCRIPTION = "by noid config set"


@click.group(cls=Group, epilog="noid config list\nnoid config set kernel /path/to/vmlinux")
def config() -> None:
    """Set what noid does unless told otherwise."""


@command(
    group=config,
    asks=False,
    name="set",
    examples="noid config set kernel vmlinux.bin\nnoid config set rootfs rootfs.ext4",
)
@click.argument("key")
@click.argument("value")
@with_yes
def set_(key: str, value: str) -> None:
    """Set KEY to VALUE.

    kernel and rootfs are files that this machine's VMs boot: when both are set, they become the image `default` of
    your own agent. update.url is where `noid update` finds a newer single file.
    """
    now = preferences.put(key, value)
    show({"key": key, "value": now}, f"{key} = {printable(str(now))}", brief=str(now))
    if key in MADE_OF:
        _make_image()


@command(group=config, asks=False, examples="noid config get kernel")
@click.argument("key")
def get(key: str) -> None:
    """Print what KEY is set to."""
    value = preferences.get(key)
    if value is None:
        raise NotFound(f"{key} is not set. Set it with: noid config set {key} VALUE")
    show({"key": key, "value": value}, printable(value), brief=printable(value))


@command(group=config, asks=False, name="list", examples="noid config list")
def list_() -> None:
    """Show what is set."""
    found = preferences.every()
    text = table(("key", "value"), list(found.items())) if found else "Nothing is set."
    show(found, text, brief="\n".join(found))


@command(group=config, asks=False, examples="noid config unset update.url")
@click.argument("key")
def unset(key: str) -> None:
    """Let KEY be what it is by default. An image that was made of it stays."""
    preferences.put(key, None)
    show({"key": key, "value": None}, f"{key} is not set")


def _make_image() -> None:
    """Make the image of both files, if both are set."""
    files = {key: preferences.get(key) for key in MADE_OF}
    missing = [key for key, value in files.items() if value is None]
    if missing:
        click.echo(f"Next: noid config set {missing[0]} PATH. VMs boot both together.", err=True)
        return
    there = {image["name"]: image for image in json.loads(_noid_server("image", "list", "--json"))}
    if there.get(IMAGE, {}).get("description", DESCRIPTION) != DESCRIPTION:
        confirmed(f"Replace the image {IMAGE!r} of your own agent? VMs made from it stay as they are.")
    options = [word for key, value in files.items() for word in (f"--{key}", str(value))]
    click.echo(_noid_server("image", "import", IMAGE, *options, "--description", DESCRIPTION, "--replace"), err=True)
    address = choose_endpoint().address
    if address != choose_endpoint(local=True).address:
        click.echo(f"Note: commands talk to {address}. With --local they use this image.", err=True)


def _noid_server(*words: str) -> str:
    """Run ``noid-server`` on the data of this user's own agent and return what it prints."""
    argv = [*local.server_program(), *words, "--data-dir", str(paths.data_dir())]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        raise BackendError(done.stderr.strip().removeprefix("Error: ") or f"noid-server failed ({done.returncode}).")
    return done.stdout.rstrip("\n")
