"""Every hook a plugin may implement.

A plugin is a module (or any object) with functions of these names, marked with `hookimpl`, announced under the
entry-point group ``noid``. pluggy is synchronous and so are hooks: **no hook is ever awaited**. A hook returns data or
a `BackendSpec`; the agent owns every lifetime.
"""

from __future__ import annotations

from pathlib import Path

import click
import pluggy

from noid.core.backends import (
    AuthBackend,
    BackendSpec,
    Event,
    ExecBackend,
    NetworkBackend,
    StorageBackend,
    VmmBackend,
    VmmSetup,
)
from noid.core.model.users import User
from noid.core.model.vms import NetLease, VmSpec

hookspec = pluggy.HookspecMarker("noid")
hookimpl = pluggy.HookimplMarker("noid")


# --- backends: asked once, before anything is opened ---------------------------------------------------------------


@hookspec
def vmm_backend() -> BackendSpec[VmmBackend] | None:
    """Offer a VMM.

    Called once, in plugin-name order. Return ``None`` when this host can never use it (wrong platform, missing
    library); the reason belongs in the log. Which of the offered backends runs is decided by ``[backends] vmm`` alone,
    never by the order of installation. Two offers of one name are an error. A list makes several offers.
    """


@hookspec
def storage_backend() -> BackendSpec[StorageBackend] | None:
    """Offer a storage backend. Same rules as `vmm_backend`."""


@hookspec
def exec_backend() -> BackendSpec[ExecBackend] | None:
    """Offer a way to run processes in guests. Same rules as `vmm_backend`; ``[backends] exec`` is a preference list."""


@hookspec
def network_backend() -> BackendSpec[NetworkBackend] | list[BackendSpec[NetworkBackend]] | None:
    """Offer a network backend, or several. Same rules as `vmm_backend`."""


@hookspec
def auth_backend() -> BackendSpec[AuthBackend] | None:
    """Offer a keeper of tokens. Same rules as `vmm_backend`."""


@hookspec(firstresult=True)
def probe_vmm() -> str | None:
    """Name the best VMM backend for ``vmm = "auto"`` on this host, or ``None`` to leave the choice to the next plugin.

    Find out by trying, not by looking: a ``/dev/kvm`` that opens may still not run a guest. The fallback is
    ``trylast``.
    """


@hookspec(firstresult=True)
def probe_storage(data_dir: Path, vmm_disk_formats: frozenset[str]) -> str | None:
    """Name the best storage backend for ``storage = "auto"`` on the filesystem of *data_dir*, or ``None``.

    *vmm_disk_formats* is what the selected VMM can open.
    """


# --- operations -----------------------------------------------------------------------------------------------------


@hookspec
def validate_vm(spec: VmSpec, owner: User) -> None:
    """Refuse a VM before anything is made by raising `noid.errors.InvalidRequest`. Pure and fast; all are asked."""


@hookspec
def boot_args(spec: VmSpec, lease: NetLease | None) -> list[str]:  # type: ignore[empty-body]  # a specification
    """Return extra kernel arguments for a cold boot. Results are joined in plugin-name order."""


@hookspec
def initrd_files(architecture: str) -> dict[str, bytes]:  # type: ignore[empty-body]  # a specification
    """Return files every guest's initrd carries, by path without leading ``/``; executable when named ``init``.

    *architecture* is as in ``uname -m``. Two plugins offering one path are an error. The files are part of the
    golden template's fingerprint, so changing them makes new templates.
    """


@hookspec
def on_event(event: Event) -> None:
    """Hear about something that happened, after it was committed, and of operations that start and end.

    Must not block; an exception is logged, no more.
    """


# --- commands -------------------------------------------------------------------------------------------------------


@hookspec
def vmm_setup() -> VmmSetup | None:
    """Say how the programs of a VMM come onto a host, for ``noid-server setup``. Called when that is typed."""


@hookspec
def register_server_commands(cli: click.Group) -> None:
    """Add commands to ``noid-server``."""
