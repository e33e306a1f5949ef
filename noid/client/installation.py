"""How this noid came onto the machine, which decides what brings a newer one.

Everybody who installs Python programs leaves a note: uv and pipx a receipt in the environment, pip and its like
``direct_url.json`` and ``INSTALLER`` beside the package, a distribution its own directory. They are read in the order
in which one excludes the others.
"""

from __future__ import annotations

import json
import shutil
import sys
import sysconfig
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARK = "noid-virtual-machines"
"""A keyword in the metadata of every noid that is this one: the public index has another program of that name."""

_PACKAGE = Path(__file__).absolute().parents[1]
_ARCHIVE: str | None = getattr(getattr(__spec__, "loader", None), "archive", None)  # zipimporter's
_OWN_ENVIRONMENT = "pipx install, uv tool install, or a virtual environment (python3 -m venv)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    """What is installed here, and how it is updated.

    Attributes:
        kind: In a word or two, for people.
        place: The file, directory or environment.
        updated_by: The program and arguments that bring a newer one, or None.
        fetched_by: What puts the one of the package index into the directory that is its last argument, to be looked
            at; None if *updated_by* does not take it from an index.
        advice: What to do instead where *updated_by* is None.
    """

    kind: str
    place: Path
    updated_by: tuple[str, ...] | None = None
    fetched_by: tuple[str, ...] | None = None
    advice: str = ""


def single_file() -> Path | None:
    """Return the single file that this noid runs from, or None."""
    return None if _ARCHIVE is None else Path(_ARCHIVE).absolute()


def find() -> Installation:
    """Return how this noid is installed. Reads files; runs nothing."""
    archive = single_file()
    if archive is not None:
        return Installation(kind="single file", place=archive)
    prefix = Path(sys.prefix)
    package = _PACKAGE
    notes = _Notes.of(package.parent)
    if notes.editable or notes.place is None:
        return Installation(
            kind="checkout",
            place=package.parent,
            advice=f"It runs from the sources in {package.parent}. Update them there, as with: git pull",
        )
    if (prefix / "uv-receipt.toml").exists():
        return Installation(
            kind="uv tool",
            place=prefix,
            updated_by=("uv", "tool", "upgrade", prefix.name),
            fetched_by=None if notes.origin else _fetch_with_uv(),
        )
    if (prefix / "pipx_metadata.json").exists():
        return _of_pipx(prefix, notes)
    if {"archive-v0", "environments-v2"} & set(prefix.parts):
        return Installation(
            kind="uvx",
            place=prefix,
            advice="uvx makes an environment for one run. Give it the newer one: uvx --refresh --from ...",
        )
    if notes.origin.startswith("git+"):
        return _of_pip(prefix, f"noid{_extras()} @ {notes.origin}", from_index=False)
    if notes.origin:
        return Installation(
            kind="file", place=prefix, advice=f"It was installed from {notes.origin}. Install a newer one from there."
        )
    if _belongs_to_the_system(package, notes):
        return Installation(
            kind="system package",
            place=package,
            advice="It came with the system's packages. Update it with them, as with: apt-get upgrade",
        )
    return _of_pip(prefix, f"noid{_extras()}", from_index=True, uv=notes.installer == "uv")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Notes:
    """What the installer wrote down beside the package; *place* is None if there is nothing."""

    place: Path | None = None
    installer: str = ""
    origin: str = ""
    editable: bool = False

    @classmethod
    def of(cls, site: Path) -> _Notes:
        # Not importlib.metadata, which takes the first noid on sys.path for the one that runs. An editable one has its
        # notes elsewhere than its sources.
        purelib = Path(sysconfig.get_path("purelib"))
        place = next((found for where in (site, purelib) for found in sorted(where.glob("noid-*.dist-info"))), None)
        if place is None:
            return cls()
        direct: dict[str, Any] = {}
        with suppress(OSError, ValueError):  # without that file it came from an index
            direct = json.loads((place / "direct_url.json").read_text())
        url, vcs = str(direct.get("url", "")), direct.get("vcs_info", {})
        if vcs:
            revision = vcs.get("requested_revision")
            url = f"{vcs.get('vcs')}+{url}" + (f"@{revision}" if revision else "")
        try:
            installer = (place / "INSTALLER").read_text().strip()
        except OSError:
            installer = ""
        editable = bool(direct.get("dir_info", {}).get("editable")) or place.parent != site
        return cls(place=place, installer=installer, origin=url, editable=editable)


def _of_pipx(prefix: Path, notes: _Notes) -> Installation:
    if prefix.parent.name != "venvs":
        return Installation(
            kind="pipx run",
            place=prefix,
            advice="pipx run makes an environment for some days. A newer one: pipx run --no-cache",
        )
    try:
        main = json.loads((prefix / "pipx_metadata.json").read_text())["main_package"]["package"]
    except (OSError, ValueError, LookupError, TypeError):
        main = "noid"
    injected = () if main == "noid" else ("--include-injected",)
    return Installation(
        kind="pipx",
        place=prefix,
        updated_by=("pipx", "upgrade", *injected, prefix.name),
        fetched_by=None if notes.origin else _fetch_with_pip() if _has_pip() else _fetch_with_uv(),
    )


def _of_pip(prefix: Path, requirement: str, *, from_index: bool, uv: bool = False) -> Installation:
    managed = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
    if sys.prefix == sys.base_prefix and managed.exists():
        return Installation(
            kind="pip",
            place=prefix,
            advice=f"The system's Python belongs to its packages, and pip must not change it. Install noid apart: "
            f"{_OWN_ENVIRONMENT}",
        )
    if _has_pip() and not (uv and shutil.which("uv")):
        return Installation(
            kind="pip",
            place=prefix,
            updated_by=(sys.executable, "-m", "pip", "install", "--upgrade", *_for_this_user(), requirement),
            fetched_by=_fetch_with_pip() if from_index else None,
        )
    return Installation(
        kind="uv pip",
        place=prefix,
        updated_by=("uv", "pip", "install", "--python", sys.executable, "--upgrade", requirement),
        fetched_by=_fetch_with_uv() if from_index else None,
    )


def _for_this_user() -> tuple[str, ...]:
    import site

    return ("--user",) if site.ENABLE_USER_SITE and _PACKAGE.is_relative_to(site.getusersitepackages()) else ()


def _fetch_with_pip() -> tuple[str, ...]:
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile")
    return (*pip, "--no-deps", "--only-binary", ":all:", "noid", "--target")


def _fetch_with_uv() -> tuple[str, ...]:
    uv = ("uv", "pip", "install", "--quiet", "--python", sys.executable)
    return (*uv, "--no-deps", "--only-binary", ":all:", "noid", "--target")


def _has_pip() -> bool:
    from importlib.util import find_spec

    return find_spec("pip") is not None


def _extras() -> str:
    """Return what the requirement needs so that a server stays one."""
    from importlib.util import find_spec

    return "[server]" if find_spec("hypercorn") is not None else ""


def _belongs_to_the_system(package: Path, notes: _Notes) -> bool:
    in_dist_packages = "dist-packages" in package.parts and not package.is_relative_to("/usr/local")
    return in_dist_packages or notes.installer in ("debian", "rpm", "conda", "portage")
