"""TAP devices that somebody has made and hands over by name: whether one is there, and what its VMM's refusal means."""

from __future__ import annotations

import re
import socket

from noid.core.model.vms import NetLease
from noid.errors import BackendError, DependencyDown

TAP = "tap"
_BUSY = re.compile(r"\(os error 16\)|Device or resource busy|Resource busy")  # EBUSY


def tap_of(lease: NetLease | None) -> str | None:
    """Return the TAP device that *lease* names; None where it is of another kind, or none.

    Raises:
        BackendError: it is a TAP's and names none.
    """
    if lease is None or lease.kind != TAP:
        return None
    if not lease.tap_name:
        raise BackendError("the network backend has given a VM a TAP device without a name.")
    return lease.tap_name


def check_tap(lease: NetLease | None) -> None:
    """Return if the TAP device of *lease*, if it is one's, is there. A VMM that may would make one that leads nowhere.

    Raises:
        DependencyDown: there is no such device.
    """
    name = tap_of(lease)
    if name is None:
        return
    try:
        socket.if_nametoindex(name)
    except OSError as error:
        raise DependencyDown(
            f"there is no network device {name!r}, which the VM was to be connected to. Make it again, or whatever "
            "has made it, and try again."
        ) from error


def busy_tap(lease: NetLease | None, said: str) -> str:
    """Return what a VMM's words *said* mean if they are that its TAP device is in use; else nothing."""
    name = tap_of(lease)
    if name is None or _BUSY.search(said) is None:
        return ""
    return f"The network device {name!r} is connected to another process: each VM needs one of its own. "
