"""``noid-server setup``: puts the programs of a VMM into place and switches it on. Downloads nothing."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from noid.errors import ConfigError, InvalidRequest
from noid.server.command import config_options, examples, run

if TYPE_CHECKING:
    from noid.core.backends import SetupFinding, VmmSetup

_FILE = click.Path(path_type=Path, dir_okay=False)
_DEFAULT_PLACE = Path("/usr/local/bin")
_SHA256 = re.compile(r"(?:sha256:)?([0-9a-fA-F]{64})")
_PROGRAM_BYTES_MAX = 256 << 20


@click.command(
    epilog=examples(
        "noid-server setup --vmm firecracker",
        "noid-server setup --vmm firecracker --file fc.tgz --checksum sums.txt",
    )
)
@config_options
@click.option("--vmm", "name", required=True, help="Which VMM.")
@click.option("--file", "file", type=_FILE, help="Its program, or the archive of its release. Else: say where it is.")
@click.option("--jailer", "jailer", type=_FILE, help="Its second program, where --file is only the first.")
@click.option("--checksum", help="SHA-256 of --file in hex, or the file it is in. Looked at before anything is run.")
@click.option("--into", type=click.Path(path_type=Path, file_okay=False), default=_DEFAULT_PLACE, show_default=True,
              help="Where programs go.")  # fmt: skip
def setup(
    config_path: Path | None,
    data_dir: Path | None,
    name: str,
    file: Path | None,
    jailer: Path | None,
    checksum: str | None,
    into: Path,
) -> None:
    """Put a VMM into place: its programs, what they need, server.toml.

    Nothing is downloaded: without --file it says what to download from where. With it, checksum and version are
    verified, the programs installed, KVM tried by running a guest, and the VMM selected in server.toml, if VMs can
    run; else the exit status is 1. Running VMs keep the program they were started with.
    """
    vmm = _setup_of(name)
    if file is None:
        if checksum or jailer:
            raise click.UsageError("--checksum and --jailer go with --file.")
        for line in vmm.source:
            click.echo(line)
        found = shutil.which(vmm.programs[0])
        if found is None:
            raise SystemExit(1)
        click.echo(f"Installed is {found}:")
        if not _report(run(lambda: vmm.examine(Path(found)))):
            raise SystemExit(1)
        return
    for given in filter(None, (file, jailer)):
        if not given.is_file():
            raise InvalidRequest(f"there is no file {given}.")
    if checksum is not None:
        _verify(file, checksum)
    with _programs(vmm, file, jailer) as programs:
        versions = {program: run(lambda p=program: vmm.version_of(p, programs[p])) for program in programs}  # type: ignore[misc]  # bound now
        if len(set(versions.values())) > 1:
            told = ", ".join(f"{program} {version}" for program, version in versions.items())
            raise InvalidRequest(f"these programs are not of one release: {told}. Nothing was installed.")
        for program, source in programs.items():
            _install(source, into / program)
            click.echo(f"installed     {into / program} {versions[program]}")
    if not _report(run(lambda: vmm.examine(into / vmm.programs[0]))):
        click.echo("not selected  server.toml is as it was: an agent would not start. Mend that, and repeat this.")
        raise SystemExit(1)
    target = _select(vmm, into / vmm.programs[0], config_path, data_dir)
    click.echo(f'selected      [backends] vmm = "{vmm.name}" in {target}; an agent that runs is to be started anew')


def _setup_of(name: str) -> VmmSetup:
    from noid.core.plugins import Plugins

    offered: dict[str, VmmSetup] = {vmm.name: vmm for vmm in Plugins().hook.vmm_setup() if vmm is not None}
    if name not in offered:
        known = ", ".join(sorted(offered)) or "none"
        raise click.UsageError(f"there is nothing to set up for VMM {name!r} on this host (there is: {known}).")
    return offered[name]


def _verify(file: Path, checksum: str) -> None:
    """Return if *file* has the *checksum*, given in hex or as a file that begins with it.

    Raises:
        InvalidRequest: it has not, or that is no checksum.
    """
    said = checksum
    if _SHA256.fullmatch(checksum) is None and Path(checksum).is_file():
        with Path(checksum).open("rb") as document:
            said = (document.read(4096).decode(errors="replace").split() or [""])[0]
    wanted = _SHA256.fullmatch(said)
    if wanted is None:
        raise InvalidRequest(f"{checksum!r} is neither a SHA-256 in hex nor a file that begins with one.")
    with file.open("rb") as data:
        found = hashlib.file_digest(data, "sha256").hexdigest()
    if found != wanted[1].lower():
        raise InvalidRequest(
            f"{file} is not what was published: its SHA-256 is {found} and not {wanted[1].lower()}. Nothing was run or "
            "installed. Download it again."
        )


@contextlib.contextmanager
def _programs(vmm: VmmSetup, file: Path, jailer: Path | None) -> Iterator[dict[str, Path]]:
    """Yield the programs of *vmm*: copies of the files given, or of what is in an archive."""
    with tempfile.TemporaryDirectory(prefix="noid-setup-") as scratch:
        place = Path(scratch)
        if tarfile.is_tarfile(file):
            _unpack(vmm, file, place)
        else:
            shutil.copyfile(file, place / vmm.programs[0])
        if jailer is not None:
            shutil.copyfile(jailer, place / vmm.programs[1])
        found = {program: place / program for program in vmm.programs if (place / program).exists()}
        if vmm.programs[0] not in found:
            raise InvalidRequest(f"{file} is an archive without {vmm.programs[0]}. Is it for another architecture?")
        for path in found.values():
            path.chmod(0o700)
        yield found


def _unpack(vmm: VmmSetup, archive: Path, place: Path) -> None:
    """Copy the programs out of *archive*; whatever else is in it stays there, and no name in it leads anywhere."""
    try:
        with tarfile.open(archive) as files:
            for member in files:
                for program in vmm.programs:
                    if not (member.isfile() and re.fullmatch(vmm.in_archive.format(program=program), member.name)):
                        continue
                    if member.size > _PROGRAM_BYTES_MAX:
                        raise InvalidRequest(
                            f"{member.name} in {archive} has {member.size} bytes: that is no {program}."
                        )
                    content = files.extractfile(member)
                    assert content is not None  # noqa: S101  it is a file
                    with (place / program).open("wb") as target:
                        shutil.copyfileobj(content, target)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InvalidRequest(f"{archive} cannot be unpacked: {error}. Download it again.") from error


def _install(source: Path, target: Path) -> None:
    """Put a copy of *source* into the place of *target*, at one instant, to be run by everybody."""
    from noid import hostfs

    partial = target.with_name(f".{target.name}.partial")
    with hostfs.os_errors(f"installing {target}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(source, partial)
            partial.chmod(0o755)
            hostfs.write_out(partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        hostfs.fsync_directory(target.parent)


def _report(findings: list[SetupFinding]) -> bool:
    """Print *findings* and return whether VMs can run."""
    for finding in findings:
        click.echo(f"{finding.status:<4}  {finding.what:<12}  {finding.text}")
        if finding.next:
            click.echo(f"{'':20}{finding.next}")
    return not any(finding.status == "fail" for finding in findings)


def _select(vmm: VmmSetup, program: Path, config_path: Path | None, data_dir: Path | None) -> Path:
    """Select *vmm* in server.toml, of which everything else stays as it is, comments too. Return which file that is.

    Raises:
        ConfigError: the file could not be read afterwards; it is as it was.
    """
    import tomlkit

    from noid import hostfs
    from noid.core import paths
    from noid.core.config.reading import FILE_NAME, SYSTEM_FILE, load_config
    from noid.core.plugins import Plugins

    target = config_path or load_config(data_dir=data_dir).source
    if target is None:
        target = SYSTEM_FILE if os.geteuid() == 0 else paths.home() / ".noid" / FILE_NAME
    target = target.resolve()
    document = tomlkit.parse(target.read_text() if target.exists() else "")
    wanted = {("backends",): ("vmm", vmm.name), ("plugins", f"vmm_{vmm.name}"): ("binary", str(program))}
    for sections, (key, value) in wanted.items():
        table = document
        for section in sections:
            if section not in table:
                table[section] = tomlkit.table(is_super_table=section == "plugins")
            table = table[section]
        table[key] = value
    with hostfs.os_errors(f"writing {target}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        try:
            partial.write_text(tomlkit.dumps(document))
            partial.chmod(target.stat().st_mode & 0o777 if target.exists() else 0o644)
            if target.exists():
                os.chown(partial, target.stat().st_uid, target.stat().st_gid)
            try:
                Plugins().check(load_config(partial))
            except ConfigError as error:
                raise ConfigError(f"{target} is as it was, because with {vmm.name} selected: {error}") from error
            hostfs.write_out(partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    return target
