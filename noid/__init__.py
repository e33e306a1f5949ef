"""noid: virtual machines that can be frozen, forked and woken in milliseconds.

``from noid import Client`` is the SDK for trio, ``from noid.sync import Client`` the same for programs without it; see
docs/sdk.md. Every command imports this module, so it holds the version, and imports the rest when that is named.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from noid.client.completed import Completed
    from noid.client.errors import CommandFailed, ConnectionFailed, ConnectionLost, ServerError
    from noid.client.event_stream import Event
    from noid.errors import NoidError
    from noid.sdk.checkpoint import Checkpoint
    from noid.sdk.client import Client
    from noid.sdk.connection import Connection
    from noid.sdk.console import Console
    from noid.sdk.events import Events
    from noid.sdk.log import Log
    from noid.sdk.process import Process
    from noid.sdk.running import RunningProcess
    from noid.sdk.vm import Vm

__version__ = "0.3.0"
__all__ = [
    "Checkpoint",
    "Client",
    "CommandFailed",
    "Completed",
    "Connection",
    "ConnectionFailed",
    "ConnectionLost",
    "Console",
    "Event",
    "Events",
    "Log",
    "NoidError",
    "Process",
    "RunningProcess",
    "ServerError",
    "Vm",
    "__version__",
]

_WHERE = {
    "noid.client.completed": ("Completed",),
    "noid.client.event_stream": ("Event",),
    "noid.client.errors": ("CommandFailed", "ConnectionFailed", "ConnectionLost", "ServerError"),
    "noid.errors": ("NoidError",),
    "noid.sdk.checkpoint": ("Checkpoint",),
    "noid.sdk.client": ("Client",),
    "noid.sdk.connection": ("Connection",),
    "noid.sdk.console": ("Console",),
    "noid.sdk.events": ("Events",),
    "noid.sdk.log": ("Log",),
    "noid.sdk.process": ("Process",),
    "noid.sdk.running": ("RunningProcess",),
    "noid.sdk.vm": ("Vm",),
}


def __getattr__(name: str) -> Any:
    """Import what is named, and remember it."""
    for module, names in _WHERE.items():
        if name in names:
            from importlib import import_module

            globals()[name] = found = getattr(import_module(module), name)
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
