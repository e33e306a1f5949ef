"""The Firecracker VMM: microVMs on KVM that are continued from a mapped file in milliseconds."""

from __future__ import annotations

import logging
import platform

from noid.core.backends import BackendSpec, VmmBackend, VmmSetup
from noid.hookspecs import hookimpl
from noid_vmm_firecracker.backend import FirecrackerConfig, open_backend
from noid_vmm_firecracker.setup import firecracker_setup

log = logging.getLogger(__name__)


@hookimpl
def vmm_backend() -> BackendSpec[VmmBackend] | None:
    """Offer Firecracker on hosts whose guests this plugin knows how to start.

    There is no ``probe_vmm``: it runs where ``[backends] vmm = "firecracker"`` says so, and nowhere by itself.
    """
    if not _can_run_here():
        log.info("vmm_firecracker is not offered: it runs x86_64 guests on x86_64 Linux only")
        return None
    return BackendSpec("firecracker", FirecrackerConfig, open_backend)


@hookimpl
def vmm_setup() -> VmmSetup | None:
    """Say how Firecracker comes onto this host, where it can run."""
    return firecracker_setup() if _can_run_here() else None


def _can_run_here() -> bool:
    return platform.system() == "Linux" and platform.machine() == "x86_64"
