"""The Firecracker VMM: microVMs on KVM that are continued from a mapped file in milliseconds."""

from __future__ import annotations

import logging
import platform

from noid.core.backends import BackendSpec, VmmBackend
from noid.hookspecs import hookimpl
from noid_vmm_firecracker.backend import FirecrackerConfig, open_backend

log = logging.getLogger(__name__)


@hookimpl
def vmm_backend() -> BackendSpec[VmmBackend] | None:
    """Offer Firecracker on hosts whose guests this plugin knows how to start.

    There is no ``probe_vmm``: it runs where ``[backends] vmm = "firecracker"`` says so, and nowhere by itself.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        log.info("vmm_firecracker is not offered: it runs x86_64 guests on x86_64 Linux only")
        return None
    return BackendSpec("firecracker", FirecrackerConfig, open_backend)
