"""What the host's apt is configured with, as far as a guest of the same distribution needs it.

Asked from apt itself, which reads both of its source formats: the distribution's own archives (other vendors' are left
out), the keys it trusts, and how it reaches the network.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from noid.core.guestbuild import programs
from noid.errors import DependencyDown

_SIGNED_BY = re.compile(r"signed-by\s*[:=]\s*(/[^\]\s]+)", re.IGNORECASE)
_OPTION = re.compile(r'Acquire::(?:https?|ftp|Check-|Max-ValidTime|Retries|ForceIPv)\S* ".+";')
# Options that only make sense on the host: files that lie there, and proxies that listen there.
_HOST_ONLY = re.compile(
    r"::(CaInfo|CaPath|SslCert|SslKey|CrlFile)\b|://(localhost|127\.|\[::1\])|Auto-Detect", re.IGNORECASE
)
_NOT_FOR_GUESTS = ("-backports", "-proposed", "-proposed-updates")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One line of sources.list, of the distribution itself."""

    uri: str
    suite: str
    components: tuple[str, ...]

    def line(self, keyring: str | None = None) -> str:
        """Return it as ``sources.list`` has it."""
        option = f"[signed-by={keyring}] " if keyring else ""
        return f"deb {option}{self.uri} {self.suite} {' '.join(self.components)}"


def codename() -> str:
    """Return the host's release: ``bookworm``, ``noble``.

    Raises:
        DependencyDown: the host is not Debian or one of its children.
    """
    release = platform.freedesktop_os_release()
    name = release.get("VERSION_CODENAME") or release.get("DEBIAN_CODENAME")
    if not name:
        raise DependencyDown(
            f"{release.get('PRETTY_NAME', 'this host')} has no release name that apt could be asked for. Import a root "
            "file system of your own with 'noid-server image import'."
        )
    return name


def distribution_sources(suite: str) -> list[Source]:
    """Return where the host gets *suite* from; for another release than the host's, the same places are taken.

    Raises:
        DependencyDown: apt has no lists of the distribution's own archives.
    """
    own = codename()
    form = "$(CREATED_BY)|$(ORIGIN)|$(CODENAME)|$(RELEASE)|$(REPO_URI)|$(COMPONENT)"
    said = programs.run(["apt-get", "indextargets", "--format", form], "asking apt for its sources").decode()
    components: dict[tuple[str, str], list[str]] = {}
    for line in said.splitlines():
        kind, origin, name, release, uri, component = [*line.split("|"), *[""] * 6][:6]
        if kind != "Packages" or origin not in ("Debian", "Ubuntu") or name.split("-")[0] != own:
            continue
        # Debian archives may be subscribed to as "stable"; the guest stays with the release it was made of
        branch = release.removeprefix(own) if release.startswith(own) else name.removeprefix(own)
        if branch not in _NOT_FOR_GUESTS:
            have = components.setdefault((uri, suite + branch), [])
            if component not in have:
                have.append(component)
    if not components:
        raise DependencyDown(
            f"apt has no package lists of this distribution's own archives for {own}. Run 'apt-get update' (with sudo) "
            "and try again."
        )
    return [Source(uri=uri, suite=name, components=tuple(c)) for (uri, name), c in sorted(components.items())]


def options(*, for_guest: bool) -> list[str]:
    """Return how the host's apt reaches archives (proxies and so on), as lines of ``apt.conf``."""
    lines = programs.run(["apt-config", "dump"], "asking apt for its configuration").decode().splitlines()
    return [line for line in lines if _OPTION.fullmatch(line) and not (for_guest and _HOST_ONLY.search(line))]


def keyrings() -> Iterator[Path]:
    """Yield the files with the keys the host's apt trusts for any of its sources."""
    place = Path("/etc/apt")
    found: set[Path] = {place / "trusted.gpg", *place.glob("trusted.gpg.d/*")}
    for file in (place / "sources.list", *place.glob("sources.list.d/*.list"), *place.glob("sources.list.d/*.sources")):
        if file.is_file():
            found.update(Path(name) for name in _SIGNED_BY.findall(file.read_text(errors="replace")))
    yield from sorted(path for path in found if path.is_file() and path.suffix in (".gpg", ".asc", ".pgp"))
