"""``noid-server doctor``: whether VMs can run here, found out by asking the plugins what an agent would ask them."""

from __future__ import annotations

import json
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from noid.errors import Damaged, NoidError
from noid.server.command import config_options, examples, run

if TYPE_CHECKING:
    from noid.core.config.settings import Config
    from noid.core.plugins import Plugins

SANDBOX_SAYS = "sandbox "
"""How the line begins by which `noid.vmmhost.sandbox` says what is in force."""
TRIAL_SECS = 30.0
FREE_BYTES_LITTLE = 4 << 30
FREE_BYTES_TOO_LITTLE = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check has found: *status* is ok, warn or fail, *next* what to do about it."""

    check: str
    status: str
    text: str
    next: str = ""


@click.command(epilog=examples("noid-server doctor", "noid-server doctor --config /etc/noid/server.toml --json"))
@config_options
@click.option("--json", "as_json", is_flag=True, help="A JSON array of what was found.")
def doctor(config_path: Path | None, data_dir: Path | None, as_json: bool) -> None:
    """Say whether VMs can run here, and what to do if not.

    Plugins try things, as when an agent starts; nothing is changed. Exit status 1 if something is wrong.
    """
    found = list(_findings(config_path, data_dir))
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in found]))
    else:
        for finding in found:
            click.echo(f"{finding.status:<4}  {finding.check:<12}  {finding.text}")
            if finding.next:
                click.echo(f"{'':20}{finding.next}")
    if any(finding.status == "fail" for finding in found):
        raise SystemExit(1)


def _findings(config_path: Path | None, data_dir: Path | None) -> Iterator[Finding]:
    from noid.core.config.reading import load_admin_config
    from noid.core.plugins import Plugins

    try:
        config = load_admin_config(config_path, data_dir=data_dir)
        with _quiet([]):
            plugins = Plugins()
        plugins.check(config)
    except NoidError as error:
        yield Finding(check="server.toml", status="fail", text=str(error), next="See: noid-server check-config")
        return
    yield Finding(check="server.toml", status="ok", text=str(config.source or "none; everything is at its default"))
    for plugin in plugins.loaded:
        if plugin.error:
            yield Finding(
                check="plugin",
                status="warn",
                text=f"{plugin.name} of {plugin.distribution} cannot be used: {plugin.error}",
                next="It is used nowhere. Repair or uninstall it.",
            )
    yield _data(config)
    yield _space(config)
    yield from _backends(config, plugins)
    yield from _images(config, plugins)


def _data(config: Config) -> Finding:
    try:
        facts = config.data_dir.stat()
    except FileNotFoundError:
        return Finding(check="data", status="ok", text=f"{config.data_dir} is made when it is needed")
    except OSError as error:
        return Finding(check="data", status="fail", text=f"{config.data_dir}: {error.strerror}")
    if not os.access(config.data_dir, os.R_OK | os.W_OK | os.X_OK):
        return Finding(
            check="data",
            status="fail",
            text=f"this user (uid {os.geteuid()}) may not write to {config.data_dir}, which is uid {facts.st_uid}'s",
            next="Run this as that user, or choose another one with --data-dir or NOID_DATA_DIR.",
        )
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return Finding(
            check="data",
            status="warn",
            text=f"others may write to {config.data_dir}",
            next=f"Run: chmod go-w {config.data_dir}",
        )
    return Finding(check="data", status="ok", text=str(config.data_dir))


def _space(config: Config) -> Finding:
    facts = os.statvfs(_existing(config.data_dir))
    free, inodes = facts.f_bavail * facts.f_frsize, facts.f_favail
    text = f"{free >> 20} MiB free" + ("" if inodes or not facts.f_files else ", and no inodes")
    too_little = free < FREE_BYTES_TOO_LITTLE or (facts.f_files and not inodes)
    status = "fail" if too_little else "warn" if free < FREE_BYTES_LITTLE else "ok"
    hint = "" if status == "ok" else "Remove VMs, checkpoints (noid rm) or images that nobody needs."
    return Finding(check="disk", status=status, text=text, next=hint)


def _existing(path: Path) -> Path:
    return next(each for each in (path, *path.parents) if each.exists())


def _backends(config: Config, plugins: Plugins) -> Iterator[Finding]:
    """Open the VMM as an agent would, with a run directory that goes away, and ask for the storage to go with it."""
    import trio

    from noid.core.backends import AgentContext

    said: list[str] = []
    with tempfile.TemporaryDirectory(prefix="noid-doctor-") as scratch, _quiet(said):
        run_dir = Path(scratch)
        context = AgentContext(
            data_dir=config.data_dir,
            run_dir=run_dir,
            database=run_dir / "noid.db",
            sandbox=config.sandbox.settings(),
        )
        vmm_finding, storage_finding = [], []

        async def job() -> None:
            with trio.fail_after(TRIAL_SECS):
                spec, settings = await trio.to_thread.run_sync(plugins.vmm, config)
                async with spec.open(settings, context) as vmm:
                    facts = ", ".join(f"{key} {value}" for key, value in vmm.fingerprint().items() if key != "vmm")
                    vmm_finding.append(f"{vmm.name}: {facts}")
                    there = replace(config, data_dir=_existing(config.data_dir))
                    chosen, _ = await trio.to_thread.run_sync(plugins.storage, there, vmm.features)
                    storage_finding.append(chosen.name)

        problem = ""
        try:
            run(job)
        except NoidError as error:
            problem = str(error)
        except trio.TooSlowError:
            problem = f"it did not answer within {TRIAL_SECS:.0f} s"
    in_force = [line.removeprefix(SANDBOX_SAYS) for line in said if line.startswith(SANDBOX_SAYS)]
    said = [line for line in said if not line.startswith(SANDBOX_SAYS)]
    if vmm_finding:
        status = "warn" if said else "ok"
        hint = "VMs work all the same, and are slower." if "accelerator tcg" in vmm_finding[0] else ""
        text = " ".join("; ".join([*vmm_finding, *said]).split())
        yield Finding(check="vmm", status=status, text=text, next=hint)
        yield from map(_sandbox, in_force)
    else:
        yield Finding(check="vmm", status="fail", text=problem)
        return
    if storage_finding:
        text = storage_finding[0]
        slow = text == "copy"
        yield Finding(
            check="storage",
            status="warn" if slow else "ok",
            text=f"{text}: every disk is a copy" if slow else text,
            next="Install qemu-utils, or keep the data on btrfs or xfs." if slow else "",
        )
    else:
        yield Finding(check="storage", status="fail", text=problem)


def _sandbox(in_force: str) -> Finding:
    """Judge what the VMM says its processes are kept in."""
    full = in_force.startswith("full:") and "; " not in in_force
    hint = "" if full else "See docs/sandbox.md for what each mode protects against, and what it needs."
    return Finding(check="sandbox", status="ok" if full else "warn", text=in_force, next=hint)


def _images(config: Config, plugins: Plugins) -> Iterator[Finding]:
    import platform

    from noid.core.images import Images

    images = Images(config.data_dir / "images", plugins.initrd_files(platform.machine()))
    good = []
    for name in images.names():
        try:
            good.append(images.get(name).name)
        except Damaged as error:
            yield Finding(
                check="image",
                status="warn",
                text=str(error),
                next=f"Make it again, or remove it: noid-server image remove {name}",
            )
    if "default" in good:
        yield Finding(check="images", status="ok", text=", ".join(good))
    else:
        configured = config.kernel is not None
        yield Finding(
            check="images",
            status="ok" if configured else "warn",
            text="made of kernel and rootfs of the settings"
            if configured
            else f"none is called default ({', '.join(good) or 'there is none'})",
            next="" if configured else "Make one: noid-server image build, or: noid-server image import",
        )


@contextmanager
def _quiet(said: list[str]) -> Iterator[None]:
    """Collect in *said* what plugins log meanwhile, in place of showing it."""

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    collector, root = Collector(), logging.getLogger()
    before = root.level
    root.addHandler(collector)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(collector)
        root.setLevel(before)
