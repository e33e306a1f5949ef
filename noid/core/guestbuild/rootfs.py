"""Makes the default guest's root file system: the host's own distribution, small, with systemd, in an ext4 file.

``mmdebstrap`` does the bootstrapping, with the host's archives, keys and proxies. As root it uses mounts of its own
namespace; as an ordinary user a user namespace, for which ``newuidmap`` and a line in ``/etc/subuid`` are needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import shutil
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from noid import hostfs
from noid.core.guestbuild import aptsources, cache, debs, ext4, programs
from noid.core.guestbuild.furnish import furnish
from noid.core.guestbuild.stages import Stage, silent
from noid.core.model.times import now
from noid.errors import BackendError, DependencyDown, InvalidRequest

DEFAULT_SIZE_BYTES = 4 << 30
SIZE_BYTES_MIN = 512 << 20
PACKAGES = (
    "bash",
    "ca-certificates",
    "curl",
    "dbus",
    "iproute2",
    "iputils-ping",
    "login",
    "passwd",
    "procps",
    "python3",
    "sudo",
    "systemd",
    "systemd-sysv",
)
_RECIPE = 4  # raise it when the same packages must give another file system
# Documentation and translations are half of a minimal system's files, and nobody reads them in a guest.
_LEFT_OUT = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/info/*", "/usr/share/locale/*")
_KEPT = ("/usr/share/doc/*/copyright", "/usr/share/locale/locale.alias")


def debian_rootfs(
    *,
    size_bytes: int = DEFAULT_SIZE_BYTES,
    suite: str | None = None,
    packages: Sequence[str] = (),
    stage: Stage = silent,
) -> Path:
    """Return an ext4 file with the default guest, from the cache or made in about a minute.

    It is made anew when one of its packages has a new version in apt's lists (``apt-get update`` renews those).

    Args:
        size_bytes: How much the guest can store; on the host it takes only what is used.
        suite: A release, as ``bookworm``; None is the host's own.
        packages: What to install beside `PACKAGES`.
        stage: Told what is being done.

    Raises:
        InvalidRequest: too small, or no such package.
        DependencyDown: something is not installed or not reachable; says what to do.
        BackendError: a step failed; carries the program's own words.
        NoSpace: the disk is full.
    """
    if size_bytes < SIZE_BYTES_MIN:
        raise InvalidRequest(f"a root file system of {size_bytes >> 20} MiB is too small; at least 512 MiB are needed.")
    suite = suite or aptsources.codename()
    wanted = sorted({*PACKAGES, *packages})
    sources = aptsources.distribution_sources(suite)
    with stage("comparing package versions"):
        versions = _versions(wanted, suite)
    facts = [_RECIPE, suite, [s.line() for s in sources], wanted, size_bytes, versions, debs.architecture()]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]

    def build(place: Path) -> None:
        with stage(f"installing {suite} with {len(wanted)} packages and what they need"):
            _bootstrap(suite, wanted, sources, place / "root.tar")
        with stage("unpacking and furnishing the guest"):
            tree = place / "tree"
            tree.mkdir(0o755)
            owners, capabilities = _unpacked(place / "root.tar", tree)
            (place / "root.tar").unlink()
            owners |= furnish(tree, sources, aptsources.options(for_guest=True))
        with stage(f"making a file system of {size_bytes >> 20} MiB"):
            ext4.make(tree, place / "rootfs.ext4", size_bytes, owners, capabilities)
            hostfs.remove_tree(tree)

    return cache.cached("rootfs", f"{suite}_{key}", build) / "rootfs.ext4"


def _versions(wanted: Sequence[str], suite: str) -> list[str]:
    """Return the versions of *wanted* and everything they depend on, as far as the host's apt knows them."""
    if suite != aptsources.codename():
        return [now().date().isoformat()]  # apt has no lists of another release: good for a day
    kinds = ("recommends", "suggests", "enhances", "breaks", "conflicts", "replaces")
    argv = ["apt-cache", "depends", "--recurse", *(f"--no-{kind}" for kind in kinds), "apt", *wanted]
    said = programs.run(argv, "resolving dependencies").decode()
    found = debs.candidates([*wanted, *(line for line in said.splitlines() if line[:1].isalnum())])
    unknown = [name for name in wanted if name not in found]
    if unknown:
        raise InvalidRequest(
            f"apt knows no package {', '.join(unknown)}. Correct the name, or run 'apt-get update' (with sudo)."
        )
    return sorted(f"{package.name}={package.version}" for package in found.values())


def _bootstrap(suite: str, wanted: Sequence[str], sources: Sequence[aptsources.Source], target: Path) -> None:
    purpose = "making the guest's root file system"
    programs.require("mmdebstrap", purpose)
    root = os.geteuid() == 0
    if not root:
        _check_user_namespaces()
    with tempfile.TemporaryDirectory(prefix="noid-keyrings-") as keys:
        place = Path(keys)
        place.chmod(0o755)  # apt checks signatures as a user of its own
        for number, keyring in enumerate(aptsources.keyrings()):
            suffix = ".gpg" if keyring.suffix == ".pgp" else keyring.suffix
            copy = place / f"{number:02}-{keyring.stem}{suffix}"
            shutil.copyfile(keyring, copy)
            copy.chmod(0o644)
        argv = ["mmdebstrap", "--variant=minbase", f"--mode={'root' if root else 'unshare'}", "--format=tar"]
        argv += [f"--include={','.join(wanted)}", f"--keyring={place}"]
        argv += [f"--aptopt={line.rstrip(';')}" for line in aptsources.options(for_guest=False)]
        argv += [f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT]
        argv += [f"--dpkgopt=path-include={pattern}" for pattern in _KEPT]
        argv += [suite, str(target), *(source.line() for source in sources)]
        try:
            programs.run(argv, purpose)
        except BackendError as error:
            if not root and "unshare" in str(error):  # not asked before: AppArmor may allow it to mmdebstrap alone
                raise DependencyDown(
                    f"{error} This machine, or the container it is, refuses user namespaces to ordinary users, and "
                    "without them only root can make a root file system. Allow them (sysctl "
                    "kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns, "
                    "user.max_user_namespaces), or run 'sudo noid-server image build --data-dir DIRECTORY'."
                ) from error
            raise BackendError(
                f"{error} Check that the network reaches the package archives and that 'apt-get update' works, then "
                "try again; or import a root file system of your own with 'noid-server image import'."
            ) from error


def _check_user_namespaces() -> None:
    user = pwd.getpwuid(os.geteuid()).pw_name
    subordinate = Path("/etc/subuid")
    lines = subordinate.read_text().splitlines() if subordinate.is_file() else []
    has_range = any(line.split(":")[0] in (user, str(os.geteuid())) for line in lines)
    if programs.find("newuidmap") is None or not has_range:
        raise DependencyDown(
            "making a root file system as an ordinary user needs user namespaces with a range of user ids. Set that up "
            f"once with 'sudo apt-get install uidmap && sudo usermod --add-subuids 100000-165535 --add-subgids "
            f"100000-165535 {user}' and try again; or run 'sudo noid-server image build --data-dir DIRECTORY'."
        )


def _unpacked(tar: Path, tree: Path) -> tuple[dict[str, tuple[int, int]], dict[str, bytes]]:
    """Unpack *tar* into *tree* as whoever we are, and return who owns what in it and what has capabilities."""
    argv = ["tar", "-xpf", str(tar), "-C", str(tree), "--no-same-owner", "--exclude=./dev/*"]
    programs.run(argv, "unpacking the root file system")
    owners: dict[str, tuple[int, int]] = {}
    capabilities: dict[str, bytes] = {}
    with tarfile.open(tar) as archive:
        for member in archive:
            path = member.name.removeprefix("./").rstrip("/")
            if member.uid or member.gid:
                owners[path] = (member.uid, member.gid)
            value = member.pax_headers.get("SCHILY.xattr.security.capability")
            if value:
                capabilities[path] = value.encode("utf-8", "surrogateescape")
    return owners, capabilities
