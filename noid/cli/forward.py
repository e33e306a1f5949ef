"""``noid port-forward``, ``open``: ports of a VM on this machine, without any network of the VM's."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from collections.abc import Iterator

import click

from noid.cli.options import call, command, resolved_vm, with_name_option
from noid.cli.output import printable, say, show
from noid.client import forwarding
from noid.client.answers import VmInfo
from noid.client.calls import ports, vms
from noid.client.calls.ports import GuestPort
from noid.client.forwarding import Forward, Forwarder, Listening
from noid.client.link import Link
from noid.client.port_stream import LocalGone, PipeEnd, PortStream, relay
from noid.client.waiting import Blocking, finished
from noid.core.model.connections import LOCALHOST, checked_port
from noid.errors import Conflict, InvalidRequest, NoidError, NotFound

INTERRUPTED = 130
STDIN_FD, STDOUT_FD = 0, 1
_HTTPS_PORTS = (443, 8443)
_NOT_TO_OPEN = frozenset({22, 53, 5355})
"""What listens in a guest without being what somebody wants to look at: SSH, and systemd's resolver."""
_PRIVILEGED_BELOW = 1024


@command(
    "port-forward",
    examples="""
noid port-forward web 8080:80
noid port-forward web 5432 :80
ssh -o ProxyCommand='noid port-forward web --stdio 22' root@web
""",
)
@click.argument("words", nargs=-1, metavar="[NAME] [LOCAL:]REMOTE...")
@with_name_option
@click.option(
    "--address", "addresses", multiple=True, metavar="ADDRESS", help="Listen here; not only for this machine's users."
)
@click.option("--stdio", is_flag=True, help="Be one connection to REMOTE: standard input and output.")
def port_forward(words: tuple[str, ...], name_option: str | None, addresses: tuple[str, ...], stdio: bool) -> int:
    """Listen on ports of this machine that lead to ports of a VM, until Ctrl+C.

    The VM needs no network for that. LOCAL is the same port unless it is given; empty or 0, any that is free. REMOTE is
    a port, or ADDRESS:PORT for an address that the VM reaches.
    """
    name, specs = _name_and_forwards(words, name_option)
    forwards = [forwarding.parse_forward(spec) for spec in specs]
    if stdio:
        if len(forwards) != 1 or addresses:
            raise click.UsageError("--stdio takes one REMOTE, and no --address.")
        return _be_one_connection(name, forwards[0])
    _look_at(name)
    with forwarding.listening(forwards, _checked(addresses) or forwarding.LOOPBACK) as listeners:
        for listener in listeners:
            _tell(name, listener)
        return _forward(name, listeners)


@command(
    "open",
    examples="""
noid open web
noid open web 3000 --browser
""",
)
@click.argument("words", nargs=-1, metavar="[NAME] [PORT]")
@with_name_option
@click.option("--browser", is_flag=True, help="Show it in the browser.")
def open_(words: tuple[str, ...], name_option: str | None, browser: bool) -> int:
    """Print a URL that leads to a port of a VM, and keep it working until Ctrl+C.

    Without PORT it is the one that something listens on; where there are several they are shown. It is a forward of
    its own, also where another one leads there.
    """
    name, port = _name_and_port(words, name_option)
    _found(name)
    wanted = _wanted_port(name, port)
    with _listening_like(wanted) as listeners:
        listener = listeners[0]
        scheme = "https" if wanted.port in _HTTPS_PORTS else "http"
        url = f"{scheme}://{listener.text}/"
        told = {"vm": name, "url": url, "address": listener.address, "port": listener.port, "remote_port": wanted.port}
        show(told, url, brief=url)
        if browser:
            _show_in_browser(url)
        return _forward(name, listeners)


def _name_and_port(words: tuple[str, ...], name_option: str | None) -> tuple[str, int | None]:
    if len(words) > 2 or (len(words) == 2 and name_option is not None):
        raise click.UsageError("give the VM and one port, as in noid open web 3000")
    if len(words) == 2:
        return resolved_vm(words[0], None), checked_port(words[1])
    if words and (name_option is not None or words[0].isdigit()):
        return resolved_vm(None, name_option), checked_port(words[0])
    return resolved_vm(words[0] if words else None, name_option), None


def _wanted_port(name: str, port: int | None) -> GuestPort:
    """Return where to connect to: *port*, or the only one that looks like it.

    Raises:
        NoidError: there is none, or there are several.
    """
    found = call().client.perform(ports.listening(name))
    if port is not None:
        there = [each for each in found if each.port == port]
        if not there:
            click.echo(f"Nothing listens on port {port} of VM '{name}' yet.", err=True)
        return there[0] if there else GuestPort(port=port)
    likely = [each for each in found if each.port not in _NOT_TO_OPEN]
    if len(likely) == 1:
        return likely[0]
    if likely:
        listed = ", ".join(str(each.port) for each in likely)
        raise Conflict(f"VM '{name}' listens on several ports: {listed}. Say which: noid open {name} {likely[0].port}")
    others = ", ".join(str(each.port) for each in found)
    raise NotFound(
        f"nothing in VM '{name}' listens on a port" + (f" but {others}" if others else "") + ". Start a server in it, "
        f"or say which port it will be: noid open {name} 8080"
    )


@contextlib.contextmanager
def _listening_like(wanted: GuestPort) -> Iterator[list[Listening]]:
    """Listen on the same port if that is free here, or on one that looks like it; else on any."""
    alike = wanted.port if wanted.port >= _PRIVILEGED_BELOW else wanted.port + 8000
    forward = Forward(local_port=alike, remote_port=wanted.port, remote_host=wanted.host)
    with contextlib.ExitStack() as stack:
        try:
            listeners = stack.enter_context(forwarding.listening([forward]))
        except NoidError:
            anywhere = dataclasses.replace(forward, local_port=forwarding.ANY)
            listeners = stack.enter_context(forwarding.listening([anywhere]))
        yield listeners


def _show_in_browser(url: str) -> None:
    import webbrowser

    if not webbrowser.open(url):
        click.echo("There is no browser here to show it in.", err=True)


def _name_and_forwards(words: tuple[str, ...], name_option: str | None) -> tuple[str, tuple[str, ...]]:
    """Return the VM and the forwards of ``[NAME] [LOCAL:]REMOTE...``. A name of digits alone takes ``--name``."""
    has_name = bool(words) and name_option is None and not words[0].isdigit() and ":" not in words[0]
    specs = words[1:] if has_name else words
    if not specs:
        raise click.UsageError("Missing argument 'REMOTE': a port of the VM, as in noid port-forward web 8080:80")
    return resolved_vm(words[0] if has_name else None, name_option), specs


def _checked(addresses: tuple[str, ...]) -> tuple[str, ...]:
    found: list[str] = []
    for address in addresses:
        if address == LOCALHOST:
            found += forwarding.LOOPBACK
            continue
        import ipaddress

        try:
            found.append(str(ipaddress.ip_address(address)))
        except ValueError as error:
            raise InvalidRequest(
                f"--address takes localhost or an IP address of this machine, no other names, and {address!r} is none. "
                "0.0.0.0 is all of them."
            ) from error
    return tuple(dict.fromkeys(found))


def _found(name: str) -> VmInfo:
    """Return the VM, whose server can forward.

    Raises:
        ServerError: there is none, or it cannot.
    """
    vm = call().perform(vms.get(name))
    if "generation" not in vm:
        finished(Link(call().endpoint, Blocking()).require("forward ports"))
    return vm


def _look_at(name: str) -> None:
    """Make sure that there is such a VM, and say so if it does not run yet: connections will be refused until it does.

    Raises:
        NoidError: there is none, or no agent.
    """
    vm = _found(name)
    if vm["state"] != "running":
        say(f"VM '{name}' is {vm['state']}; connections are refused until it runs.")


def _tell(name: str, listener: Listening) -> None:
    forward = listener.forward
    if call().json:
        told = {
            "vm": name,
            "address": listener.address,
            "port": listener.port,
            "remote_host": forward.remote_host,
            "remote_port": forward.remote_port,
        }
        click.echo(json.dumps(told))
    elif call().quiet:
        click.echo(listener.text)
    else:
        click.echo(f"Forwarding from {listener.text} -> {forward.target}")


def _forward(name: str, listeners: list[Listening]) -> int:
    """Forward until Ctrl+C. A connection that fails is a line on stderr, and no more than that."""
    speaking = threading.Lock()

    def on_failure(listener: Listening, why: str) -> None:
        with speaking:
            click.echo(f"Error: {listener.text} -> {listener.forward.target}: {printable(why)}", err=True)

    try:
        Forwarder(call().endpoint, name, listeners, on_failure).run()
    except KeyboardInterrupt:
        return INTERRUPTED


def _be_one_connection(name: str, forward: Forward) -> int:
    link = Link(call().endpoint, Blocking())
    stream = finished(PortStream.open(link, name, forward.remote_port, forward.remote_host))
    try:
        finished(relay(link, stream, PipeEnd(STDIN_FD, STDOUT_FD)))
    except LocalGone as error:
        raise NoidError("whoever read the output has gone, so the connection was broken off.") from error
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        stream.close()
    return 0
