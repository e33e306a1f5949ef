"""What lies beside the data and says whose it is, so that a lost or outdated database loses no VM and no checkpoint.

The database is the truth. But it is one file, and files get lost, or come back from a backup that is older than the
VMs. So each owner's directory has a ``user.json``, and each machine's directory a ``vm.json`` written as its VM is
committed. A start takes up what the database has never heard of; what it has heard of and has no row for is a leftover.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path

from noid import hostfs
from noid.core.database.store import Store, Tx
from noid.core.layout import Layout
from noid.core.model.users import User
from noid.core.model.vms import NetLease, ProcessRef, Receipt, ReceiptItem, Vm, VmState

logger = logging.getLogger(__name__)

_USER = "user.json"
_VM = "vm.json"


def write_user(layout: Layout, user: User) -> None:
    """Leave *user*'s name in their directory, if it is not there yet. Blocking.

    Raises:
        BackendError, NoSpace: nothing is left of it.
    """
    path = layout.users / user.id / _USER
    if not path.exists():
        with hostfs.os_errors("writing down whose directory this is"):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _write(path, asdict(user))


def write_vm(layout: Layout, vm: Vm, owner: User) -> None:
    """Leave *vm*'s row in its machine's directory. Blocking.

    Raises:
        BackendError, NoSpace: nothing is left of it.
    """
    with hostfs.os_errors("writing down which VM this is"):
        _write(layout.vm(vm.instance) / _VM, {"vm": asdict(vm), "owner": asdict(owner)})


def take_up_users(store: Store, layout: Layout) -> None:
    """Give users that have a directory and no row their row back, with their id. Their tokens are gone. Blocking."""
    known = {user.id for user in store.users()}
    for directory in _directories(layout.users):
        if directory.name not in known and (user := _read_user(directory)) is not None:
            _take_up_user(store, user)


def take_up_vms(store: Store, layout: Layout) -> set[str]:
    """Give VMs that the database has never heard of their rows back. Return the instances nobody may remove. Blocking.

    The newest row of a VM counts: an in-place restore that a backup does not know has replaced its machine.
    """
    rows = {vm.id: vm for vm in store.all_vms()}
    instances = {vm.instance for vm in rows.values()}
    spared: set[str] = set()
    found = [deed for directory in _directories(layout.vms) if (deed := _read_vm(directory)) is not None]
    for vm, owner in sorted(found, key=lambda deed: deed[0].generation, reverse=True):
        if vm.instance in instances or store.knows_instance(vm.instance):
            continue
        row = rows.get(vm.id)
        if row is not None and row.generation >= vm.generation:
            continue  # a newer machine of this VM was found: this one is what that has replaced
        _take_up_user(store, owner)
        if any(other.name == vm.name and other.id != vm.id for other in store.vms(vm.owner)):
            logger.error(
                "VM %s of %s is in %s and in no database, but its name is taken: it is left alone. Destroy the other "
                "one and restart the agent to get it back.", vm.name, owner.name, layout.vm(vm.instance),
            )  # fmt: skip
            spared.add(vm.instance)
            continue
        store.write_now(partial(Tx.replace_vm, vm=vm))
        rows[vm.id] = vm
        logger.warning("VM %s of %s (%s) has its row again", vm.name, owner.name, vm.instance)
    return spared


def _take_up_user(store: Store, user: User) -> None:
    users = store.users()
    if any(known.id == user.id for known in users):
        return
    name = user.name
    if any(known.name == name for known in users):
        name = f"{name[:40]}-{user.id[-12:]}"
    store.write_now(lambda tx: tx.insert_user(name, user.id, user.created_at))
    logger.warning("user %s has a row again, but no token: noid-server rotate-token makes one", name)


def _read_user(directory: Path) -> User | None:
    try:
        user = _user(json.loads((directory / _USER).read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("%s is damaged: %s", directory / _USER, error)
        return None
    return user if user.id == directory.name else None


def _read_vm(directory: Path) -> tuple[Vm, User] | None:
    try:
        deed = json.loads((directory / _VM).read_text())
        fields = deed["vm"]
        lease, process, receipt = fields["lease"], fields["process"], fields["receipt"]
        vm = Vm(
            **fields | {
                "state": VmState(fields["state"]),
                "lease": NetLease(**lease) if lease else None,
                "process": ProcessRef(**process) if process else None,
                "receipt": Receipt(items=tuple(ReceiptItem(**i) for i in receipt["items"])) if receipt else None,
                "created_at": datetime.fromisoformat(fields["created_at"]),
                "busy": None,
                "responding": None,
                "unresponsive_since": None,
            }
        )  # fmt: skip
        owner = _user(deed["owner"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("%s is damaged: %s", directory / _VM, error)
        return None
    return (vm, owner) if vm.instance == directory.name and vm.owner == owner.id else None


def _user(fields: dict[str, str]) -> User:
    return User(id=fields["id"], name=fields["name"], created_at=datetime.fromisoformat(fields["created_at"]))


def _write(path: Path, document: dict[str, object]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, default=_plain, indent=1) + "\n")
    partial.rename(path)


def _plain(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _directories(parent: Path) -> list[Path]:
    return sorted(entry for entry in parent.iterdir() if entry.is_dir()) if parent.is_dir() else []
