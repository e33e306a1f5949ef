"""The QEMU VMM: hardware-accelerated where KVM works, emulated everywhere else, with the same semantics."""

from __future__ import annotations

import logging
import platform

from noid.core.backends import BackendSpec, VmmBackend
from noid.hookspecs import hookimpl
from noid_vmm_qemu.backend import QemuConfig, open_backend

log = logging.getLogger(__name__)


@hookimpl
def vmm_backend() -> BackendSpec[VmmBackend] | None:
    """Offer QEMU on hosts whose guests it knows how to start."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        log.info("vmm_qemu is not offered: it runs x86_64 guests on x86_64 Linux only")
        return None
    return BackendSpec("qemu", QemuConfig, open_backend)


@hookimpl(trylast=True)
def probe_vmm() -> str:
    """Be what is left when nobody else wants to: QEMU runs guests with and without KVM."""
    return "qemu"
