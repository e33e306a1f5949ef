"""Takes packages from the host's own apt, without installing them: whatever sources, keys and proxies it has are used.

``apt-get download`` needs no privileges and verifies what it fetches.
"""

from __future__ import annotations

import io
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from noid.core.guestbuild import programs
from noid.errors import BackendError, DependencyDown

_DEPENDENCY = re.compile(r"[a-z0-9][a-z0-9+.-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A package as apt would install it now. *depends* are names; of alternatives, the first."""

    name: str
    version: str
    architecture: str
    depends: tuple[str, ...] = ()


def architecture() -> str:
    """Return the host's architecture in Debian's words: ``amd64``, ``arm64``."""
    return programs.run(["dpkg", "--print-architecture"], "asking dpkg for the architecture").decode().strip()


def names(prefix: str) -> list[str]:
    """Return every package name apt knows that begins with *prefix*."""
    return sorted(programs.run(["apt-cache", "pkgnames", prefix], "asking apt for package names").decode().split())


def candidates(wanted: Iterable[str]) -> dict[str, Package]:
    """Return what apt would install for each of the *wanted* names, leaving out those it does not know."""
    known = sorted(set(wanted))
    if not known:
        return {}
    argv = ["apt-cache", "show", "--no-all-versions", *known]
    program = programs.require(argv[0], "looking for packages")
    # apt-cache exits with 100 when one of several names is unknown, which is an answer here
    done = subprocess.run([program, *argv[1:]], capture_output=True, env=programs.environment(), check=False)
    if done.returncode not in (0, 100):
        raise BackendError(f"looking for packages failed: {programs.failure(argv[0], done.returncode, done.stderr)}.")
    found: dict[str, Package] = {}
    for paragraph in done.stdout.decode(errors="replace").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if re.match(r"[A-Za-z-]+: ", line))
        if "Package" in fields and "Version" in fields and fields["Package"] not in found:
            found[fields["Package"]] = Package(
                name=fields["Package"],
                version=fields["Version"],
                architecture=fields.get("Architecture", ""),
                depends=_names(fields.get("Pre-Depends", "")) + _names(fields.get("Depends", "")),
            )
    return found


def candidate(name: str) -> Package:
    """Return what apt would install for *name*.

    Raises:
        DependencyDown: apt has never heard of it.
    """
    found = candidates([name]).get(name)
    if found is None:
        raise DependencyDown(
            f"apt knows no package {name}. Run 'apt-get update' (with sudo), check that the distribution's own "
            "sources are enabled, and try again."
        )
    return found


def files(package: Package, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Download *package* and return the content of the regular files whose path (without leading ``/``) is *wanted*.

    Raises:
        DependencyDown: it cannot be downloaded (no network, outdated lists).
        BackendError: the archive is damaged.
    """
    with tempfile.TemporaryDirectory(prefix="noid-deb-") as place:
        _download(package, Path(place))
        return _unpacked(next(Path(place).glob("*.deb")), wanted)


def _names(field: str) -> tuple[str, ...]:
    matches = (_DEPENDENCY.match(part.strip()) for part in field.split(","))
    return tuple(match.group() for match in matches if match)


def _download(package: Package, place: Path) -> None:
    # as root, apt would download as user _apt, who cannot write here; the check of the signature is the same
    argv = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", f"{package.name}={package.version}"]
    try:
        programs.run(argv, f"downloading {package.name} {package.version}", cwd=place)
    except BackendError as error:
        raise DependencyDown(
            f"{error} Check the network and the apt sources, run 'apt-get update' (with sudo), and try again."
        ) from error


def _unpacked(deb: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    tar = programs.run(["dpkg-deb", "--fsys-tarfile", str(deb)], f"unpacking {deb.name}")
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
            for member in archive:
                path = member.name.removeprefix("./")
                if member.isfile() and wanted(path):
                    content = archive.extractfile(member)
                    found[path] = content.read() if content else b""
    except tarfile.TarError as error:
        raise BackendError(f"unpacking {deb.name} failed: {error}. Try again.") from error
    return found
