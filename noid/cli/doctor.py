"""``noid doctor``: what could keep commands from working, looked for in the order in which one thing needs another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from noid import __version__
from noid.cli import colours
from noid.cli.options import call, command
from noid.cli.output import printable, progress, show
from noid.client import installation, local, servers
from noid.client.calls import account
from noid.client.calls.call import Call, NotNoid, Reply
from noid.client.errors import ServerError
from noid.client.link import Link
from noid.client.settings import Endpoint
from noid.client.waiting import Blocking, finished
from noid.core import paths
from noid.errors import ConfigError, NoidError

SKEW_SECS = 60.0
SLOW_SECS = 1.0
CERTIFICATE_DAYS = 14
CONNECT_SECS = 5.0
TRIAL_SECS = 90.0
UNAUTHENTICATED = 401
PAINT = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check has found: *status* is ok, warn or fail, *next* what to do about it."""

    check: str
    status: str
    text: str
    next: str = ""


@command(examples="noid doctor\nnoid doctor --server work --json")
def doctor() -> int:
    """Look for what could keep noid from working, and say what to do about it.

    Settings, the server and your token; on this machine also QEMU, KVM, disk and images. Nothing is changed, and no
    agent started. Exit code 1 if something is wrong.
    """
    with progress("Looking"):
        found = list(_findings())
    lines = []
    for finding in found:
        status = colours.painted(f"{finding.status:<4}", PAINT[finding.status], sys.stdout)
        lines.append(f"{status}  {finding.check:<12}  {printable(finding.text)}")
        if finding.next:
            lines.append(f"{'':20}{printable(finding.next)}")
    failed = [finding.check for finding in found if finding.status == "fail"]
    show([asdict(finding) for finding in found], "\n".join(lines), brief="\n".join(failed))
    return 1 if failed else 0


def _findings() -> Iterator[Finding]:
    here = installation.find()
    yield Finding(check="noid", status="ok", text=f"{__version__}, {here.kind}, {here.place}")
    try:
        yield from _settings()
        endpoint = call().endpoint
    except NoidError as error:
        yield Finding(check="settings", status="fail", text=str(error))
        return
    if endpoint.data_dir is not None:
        yield from _this_machine(endpoint, Path(endpoint.data_dir))
    else:
        yield from _server(endpoint)


def _settings() -> Iterator[Finding]:
    """Read the files that name servers.

    Raises:
        NoidError: one is broken.
    """
    known = servers.known()
    current = servers.in_use()
    name = next((each.name for each in known if each.is_same(current)), servers.LOCAL)
    text = f"{servers.config_path()}: {name} of {', '.join([*(each.name for each in known), servers.LOCAL])}"
    exposed = servers.exposed()
    if exposed:
        files = " ".join(map(str, exposed))
        yield Finding(
            check="settings",
            status="warn",
            text=f"other users can read your token in {files}",
            next=f"Run: chmod 600 {files}",
        )
    else:
        yield Finding(check="settings", status="ok", text=text)
    for variable in ("NOID_SERVER", "NOID_URL", "NOID_TOKEN"):
        if value := os.environ.get(variable):
            shown = "is set" if variable == "NOID_TOKEN" else f"is {value}"
            yield Finding(check="environment", status="ok", text=f"{variable} {shown}, and wins over the files")


# --- a server --------------------------------------------------------------------------------------------------------


def _server(endpoint: Endpoint) -> Iterator[Finding]:
    if (endpoint.url or "").startswith("http://") and endpoint.token and not _is_loopback(endpoint):
        yield Finding(
            check="encryption",
            status="warn",
            text=f"{endpoint.url} is not encrypted: whoever is on the way reads your token and everything else",
            next="Use https://, see [tls] in docs/configuration.md.",
        )
    if (endpoint.url or "").startswith("https://"):
        yield from _certificate(endpoint)
    began = time.monotonic()
    try:
        reply = _asked(endpoint, _RAW_VERSION)
        secs = time.monotonic() - began
        version = account.version().understand(reply)
    except NotNoid:
        yield Finding(
            check="server", status="fail", text=f"{endpoint.address} is no noid-server", next="Is the URL right?"
        )
        return
    except NoidError as error:
        yield Finding(check="server", status="fail", text=str(error))
        return
    slow = secs > SLOW_SECS
    what = f"noid-server {version['version']}, API {version['api_version']}"
    yield Finding(
        check="server",
        status="warn" if slow else "ok",
        text=f"{endpoint.address}: {what}, {secs * 1000:.0f} ms",
        next="It is slow to answer. Is the network, or the server busy?" if slow else "",
    )
    yield from _clocks(reply, secs)
    yield from _token(endpoint)


_RAW_VERSION: Call[Reply] = Call(method="GET", path="/version", understand=lambda reply: reply)


def _asked(endpoint: Endpoint, request: Call[Any]) -> Any:
    return finished(Link(endpoint, Blocking()).perform(request))


def _is_loopback(endpoint: Endpoint) -> bool:
    from ipaddress import ip_address
    from urllib.parse import urlsplit

    host = urlsplit(endpoint.url or "").hostname or ""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _certificate(endpoint: Endpoint) -> Iterator[Finding]:
    """Look when the certificate ends. Whether it is a good one is found out by using it."""
    import socket
    import ssl
    from urllib.parse import urlsplit

    parts = urlsplit(endpoint.url or "")
    context = ssl.create_default_context()
    try:
        with (
            socket.create_connection((parts.hostname or "", parts.port or 443), timeout=CONNECT_SECS) as plain,
            context.wrap_socket(plain, server_hostname=parts.hostname) as secured,
        ):
            certificate = secured.getpeercert() or {}
            cipher = secured.version()
    except OSError:  # ssl.SSLError is one; the request that follows says what is wrong
        return
    days = (ssl.cert_time_to_seconds(cast("str", certificate["notAfter"])) - time.time()) / 86400
    soon = days < CERTIFICATE_DAYS
    yield Finding(
        check="certificate",
        status="warn" if soon else "ok",
        text=f"{cipher}, good for {days:.0f} days",
        next="Whoever runs the server has to renew it." if soon else "",
    )


def _clocks(reply: Reply, secs: float) -> Iterator[Finding]:
    from email.utils import parsedate_to_datetime

    try:
        there = parsedate_to_datetime(reply.headers["date"]).timestamp()
    except (KeyError, ValueError, TypeError):
        return
    apart = time.time() - there
    if abs(apart) > SKEW_SECS + secs:
        yield Finding(
            check="clock",
            status="warn",
            text=f"this machine's clock is {abs(apart):.0f} s {'ahead of' if apart > 0 else 'behind'} the server's",
            next="Tokens and certificates expire by the clock. Synchronise both, as with: timedatectl set-ntp true",
        )
    else:
        yield Finding(check="clock", status="ok", text=f"within {SKEW_SECS:.0f} s of the server's")


def _token(endpoint: Endpoint) -> Iterator[Finding]:
    if endpoint.token is None and endpoint.url:
        yield Finding(
            check="token", status="fail", text=f"none is known for {endpoint.url}", next="Run: noid auth setup"
        )
        return
    try:
        who = _asked(endpoint, account.whoami())
    except NoidError as error:
        status = getattr(error, "status", None) if isinstance(error, ServerError) else None
        hint = "Ask who runs the server for a new one." if status == UNAUTHENTICATED else ""
        yield Finding(check="token", status="fail", text=str(error), next=hint)
        return
    scopes = who.get("scopes")
    text = f"you are {who['name']}" + (f", with the token {who['token']}" if who.get("token") else "")
    yield Finding(check="token", status="ok", text=text + (f" ({', '.join(scopes)})" if scopes else ""))


# --- this machine ----------------------------------------------------------------------------------------------------


def _this_machine(endpoint: Endpoint, data_dir: Path) -> Iterator[Finding]:
    yield _agent(endpoint, data_dir)
    try:
        program = local.server_program()
    except ConfigError as error:
        yield Finding(check="noid-server", status="fail", text=str(error))
        return
    argv = [*program, "doctor", "--json", "--data-dir", str(data_dir)]
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=TRIAL_SECS,
        )
    except (OSError, subprocess.SubprocessError) as error:
        yield Finding(check="noid-server", status="fail", text=f"{' '.join(argv)} does not end as it should: {error}")
        return
    try:
        found = [Finding(**each) for each in json.loads(done.stdout)]
    except (ValueError, TypeError):
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        yield Finding(check="noid-server", status="fail", text=f"{program[0]} cannot be asked: {last}")
        return
    yield from found


def _agent(endpoint: Endpoint, data_dir: Path) -> Finding:
    """Ask the agent if it runs, without starting one."""
    path = paths.socket_path(data_dir)
    try:
        paths.check_private(path.parent)
        if not path.exists():
            raise FileNotFoundError
        version = _asked(replace(endpoint, data_dir=None), account.version())
    except FileNotFoundError:
        return Finding(check="agent", status="ok", text="not running; it starts with the first command that needs it")
    except NoidError as error:
        if "refused" in str(error):
            return Finding(check="agent", status="ok", text="not running; it starts with the next command")
        return Finding(check="agent", status="fail", text=str(error), next=f"See {data_dir / local.LOG_NAME}.")
    same = version["version"] == __version__
    return Finding(
        check="agent",
        status="ok" if same else "warn",
        text=f"runs: noid-server {version['version']}",
        next=""
        if same
        else f"It is another version than this noid {__version__}. Start it anew: end the process in "
        f"{data_dir / 'agent.lock'}; VMs run on.",
    )
