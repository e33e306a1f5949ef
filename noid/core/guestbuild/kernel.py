"""Gets the guest kernel: the newest cloud kernel of the host's distribution, unpacked, never installed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from noid.core.guestbuild import cache, debs
from noid.core.guestbuild.modules import boot_modules, module_name
from noid.core.guestbuild.stages import Stage, silent
from noid.core.guestbuild.vmlinux import unwrapped
from noid.errors import BackendError, DependencyDown

_RECIPE = 2  # raise it when the same package must give other files
_HOPS_MAX = 4  # Ubuntu: linux-image-virtual-hwe -> linux-image-generic-hwe -> linux-image-6.8.0-45-generic

# Which kernel packages will do, best first. Cloud kernels are built for virtual machines: small, quick to boot.
_KINDS = (
    re.compile(r"linux-image-(\d+\.\d+-)?cloud-(amd64|arm64)"),  # Debian; with a number: a newer line in an old release
    re.compile(r"linux-image-virtual"),  # Ubuntu
    re.compile(r"linux-image-kvm"),
    re.compile(r"linux-image-(generic|amd64|arm64)"),
)
_MODULES = re.compile(r"linux-modules-\d")
_BOOT_FILE = re.compile(r"(usr/lib/modules/[^/]+/|boot/)vmlinuz[^/]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A guest kernel in the cache. *modules* holds the ``.ko`` files its initrd needs."""

    vmlinux: Path
    modules: Path
    release: str
    package: str
    version: str


def distribution_kernel(stage: Stage = silent) -> Kernel:
    """Return the newest kernel for virtual machines that apt offers, from the cache or downloaded (35 MB on Debian).

    Raises:
        DependencyDown: no apt, no network, or no such package; says what to do.
        BackendError: what the package holds is not what was expected.
        NoSpace: the disk of the cache is full.
    """
    image, modules = _resolved(_newest())

    def build(place: Path) -> None:
        with stage(f"downloading kernel {image.name} {image.version}"):
            files: dict[str, bytes] = {}
            for package in (image, *modules):
                files |= debs.files(package, lambda path: bool(_BOOT_FILE.fullmatch(path)) or bool(module_name(path)))
        with stage("unpacking the kernel and its modules"):
            _unpack(files, image, place)

    place = cache.cached("kernels", f"{image.name}_{image.version.replace(':', '.')}_{_RECIPE}", build)
    return Kernel(
        vmlinux=place / "vmlinux",
        modules=place / "modules",
        release=(place / "release").read_text().strip(),
        package=image.name,
        version=image.version,
    )


def _unpack(files: dict[str, bytes], image: debs.Package, place: Path) -> None:
    boot = next((path for path in sorted(files) if _BOOT_FILE.fullmatch(path)), None)
    if boot is None:
        raise BackendError(f"package {image.name} {image.version} holds no kernel. Import one with 'image import'.")
    kernel = unwrapped(files[boot], boot)
    (place / "vmlinux").write_bytes(kernel.content)
    (place / "release").write_text(kernel.release + "\n")
    (place / "modules").mkdir()
    for module in boot_modules((path for path in files if f"/modules/{kernel.release}/" in path), files.__getitem__):
        (place / "modules" / f"{module.name}.ko").write_bytes(module.content)


def _newest() -> debs.Package:
    names = debs.names("linux-image-")
    for kind in _KINDS:
        found = debs.candidates(name for name in names if kind.fullmatch(name))
        if found:
            return max(found.values(), key=lambda package: _numbers(package.version))
    raise DependencyDown(
        "apt offers no kernel package for guests (linux-image-cloud-amd64 on Debian, linux-image-virtual on Ubuntu). "
        "Run 'apt-get update' (with sudo) and try again, or import a kernel of your own (noid-server image import)."
    )


def _resolved(package: debs.Package) -> tuple[debs.Package, list[debs.Package]]:
    """Follow a meta package to the one with the kernel in it, and to the packages with its modules."""
    for _ in range(_HOPS_MAX):
        following = [name for name in package.depends if name.startswith("linux-image-")]
        if not following:
            modules = debs.candidates(name for name in package.depends if _MODULES.match(name))
            return package, sorted(modules.values(), key=lambda m: m.name)
        package = debs.candidate(following[0])
    raise DependencyDown(
        f"package {package.name} {package.version} leads to no kernel. Import one with 'noid-server image import'."
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))
