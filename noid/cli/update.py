"""``noid version`` and ``noid update``: which noid this is, where it came from, and how a newer one gets here."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import click

from noid import __version__
from noid.cli.options import call, command, confirmed, with_yes
from noid.cli.output import printable, progress, show
from noid.client import installation, preferences, selfupdate
from noid.client.answers import ServerVersion
from noid.client.calls import account
from noid.client.installation import Installation
from noid.client.link import Link
from noid.client.waiting import Blocking, finished
from noid.errors import ConfigError, DependencyDown, NoidError


@command(examples="noid version\nnoid version --server work --json")
def version() -> None:
    """Show which noid this is, where it is installed, and which server answers. Starts no agent."""
    here = installation.find()
    endpoint = call().endpoint
    server: ServerVersion | None = None
    trouble = ""
    try:
        server = finished(Link(replace(endpoint, data_dir=None), Blocking()).perform(account.version()))
    except NoidError as error:
        trouble = "not running" if endpoint.data_dir else str(error)
    python = ".".join(map(str, sys.version_info[:3]))
    lines = [f"noid {__version__}", f"Installed: {here.kind}, {here.place}", f"Python: {python}, {sys.executable}"]
    if server is None:
        lines.append(f"Server: {trouble} ({endpoint.address})" if endpoint.data_dir else f"Server: {trouble}")
    else:
        lines.append(
            f"Server: {printable(str(server['version']))}, API {server['api_version']!r}, at {endpoint.address}"
        )
    value = {
        "version": __version__,
        "installed": {"kind": here.kind, "place": str(here.place)},
        "python": python,
        "server": {"address": endpoint.address} | (dict(server) if server else {"error": trouble}),
    }
    show(value, "\n".join(lines), brief=__version__)


@command(asks=False, examples="noid update\nNOID_UPDATE_URL=https://host/noid.pyz noid update")
@with_yes
def update() -> None:
    """Bring a newer noid, the way this one came: by pip, pipx, uv, or as a single file.

    A single file is downloaded from NOID_UPDATE_URL, or what `noid config set update.url` says, and replaced only
    when its checksum is right and it runs.
    """
    here = installation.find()
    if here.kind == "single file":
        _update_file(here.place)
    elif here.updated_by is None:
        raise ConfigError(f"this noid ({here.kind}) is not updated by itself. {here.advice}")
    else:
        _update_by(here, here.updated_by)


def _update_file(place: Path) -> None:
    url = os.environ.get("NOID_UPDATE_URL") or preferences.get("update.url")
    if not url:
        raise ConfigError(
            "nobody said where newer versions of this single file are. Run: noid config set update.url "
            f"https://.../{selfupdate.FILE_NAME} (its checksum is beside it, with .sha256)"
        )
    url = selfupdate.checked_url(url)
    place = place.resolve()
    with progress(f"Asking {url}"):
        checksum = selfupdate.offered_checksum(url)
    if checksum == selfupdate.checksum_of(place):
        _say(__version__, __version__)
        return
    confirmed(f"Replace {place}, noid {__version__}, by the one at {url}?")
    with progress(f"Downloading {url}"):
        new = selfupdate.replace(place, url, checksum)
    _say(__version__, new)


def _update_by(here: Installation, updated_by: tuple[str, ...]) -> None:
    offered = ""
    if here.fetched_by is not None:
        with progress("Asking the package index"):
            offered = _offered_by_the_index(here.fetched_by)
        if offered == __version__:
            _say(__version__, __version__)
            return
    shown = " ".join(updated_by)
    confirmed(f"Update noid {__version__}{f' to {offered}' if offered else ''} by: {shown}?")
    click.echo(f"Running: {shown}", err=True)
    done = _run(updated_by, stdout=2)
    if done.returncode != 0:
        raise ConfigError(f"{updated_by[0]} failed (status {done.returncode}); what it said is above.")
    # Another process: this one has the old modules, and the environment may be a new one.
    asked = _run((sys.executable, "-c", "import noid; print(noid.__version__)"), stdout=subprocess.PIPE)
    if asked.returncode != 0:
        raise ConfigError(f"{updated_by[0]} did its work, and noid does not start now. Try again: {shown}")
    _say(__version__, asked.stdout.strip())


def _offered_by_the_index(fetched_by: tuple[str, ...]) -> str:
    """Return the version of the noid that the package index has; it is fetched aside and looked at.

    Raises:
        ConfigError: there is none, or what is called noid there is another program.
    """
    import re
    import tempfile

    with tempfile.TemporaryDirectory(prefix="noid-update-") as aside:
        done = _run((*fetched_by, aside), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        found = sorted(Path(aside).glob("noid-*.dist-info/METADATA"))
        if done.returncode != 0 or not found:
            last = "\n".join(done.stdout.strip().splitlines()[-5:])
            raise ConfigError(f"the package index has no noid for this Python. Nothing was changed.\n{last}".rstrip())
        head = found[0].read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    fields = dict(re.findall(r"^([A-Za-z-]+): (.*)$", head, re.MULTILINE))
    offered = str(fields.get("Version", ""))
    if installation.MARK not in fields.get("Keywords", ""):
        raise ConfigError(
            f"what the package index calls noid is another program: {offered}, "
            f"{printable(fields.get('Summary', '?'))!r}. Nothing was changed. Install a newer noid from where you got "
            "this one."
        )
    return offered


def _run(argv: tuple[str, ...], *, stdout: int, stderr: int | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            argv, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, text=True, errors="replace", check=False
        )
    except FileNotFoundError as error:
        raise DependencyDown(
            f"noid was installed with {argv[0]}, which is not found now. With it on PATH, run: {' '.join(argv)}"
        ) from error


def _say(old: str, new: str) -> None:
    """Say what has come of it, in the words of the predecessor."""
    text = f"noid is already up to date (v{old})" if old == new else f"Updated noid v{old} -> v{new}"
    show({"before": old, "after": new, "updated": old != new}, text, brief=new)
