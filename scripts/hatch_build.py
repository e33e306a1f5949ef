"""Compiles noid's C programs when noid is built, and by hand: ``python scripts/hatch_build.py``.

They are the guest agent, for guests' architectures, and the launcher of VMMs, for hosts'. One static program for each
architecture, made by the C compiler in the ``ziglang`` wheel, so that no system compiler is needed. The same source
gives the same bytes on every machine: the compiler version is pinned, and neither paths nor times get into the program.
What is up to date is not built again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # by hand, without a build environment, only the compiler is needed
    BuildHookInterface = object  # type: ignore[misc, assignment]  # the same name, for the class statement below

GUEST_DIR = Path("plugins/exec_vsock/noid_exec_vsock/guest")
LAUNCHER_DIR = Path("noid/vmmhost/launcher")
#: Directories of sources, and what the program each makes is called.
PROGRAMS = {GUEST_DIR: "noid-agent", LAUNCHER_DIR: "noid-launcher"}
ARCHITECTURES = ("x86_64", "aarch64")
ZIG_VERSION = "0.17.0"
# -O2, not -Os: for size, clang copies by `rep movsb`, which emulators do byte by byte.
FLAGS = (
    *("-std=gnu11", "-D_GNU_SOURCE", "-static", "-O2", "-s", "-fno-ident", "-fstack-protector-strong"),
    *("-Wall", "-Wextra", "-Wshadow", "-Wvla", "-Wconversion", "-Wno-sign-conversion", "-Wstrict-prototypes"),
    *("-Wmissing-prototypes", "-Wformat=2", "-Wno-format-nonliteral", "-Werror", "-Wl,--build-id=none"),
)


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]  # generic in hatchling, not in our fallback
    """What hatchling calls before it makes a wheel or an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile what is missing or out of date. An sdist carries sources only."""
        del version, build_data
        if self.target_name == "wheel":
            build_all(Path(self.root))


def sources_digest(directory: Path) -> str:
    """Return what identifies the programs *directory* makes: every source, the flags, the compiler's version."""
    digest = hashlib.sha256(repr((FLAGS, ZIG_VERSION)).encode())
    for path in sorted([*directory.glob("*.c"), *directory.glob("*.h")]):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def compile_program(directory: Path, architecture: str, output: Path, *, scratch: Path) -> None:
    """Compile the sources in *directory* for *architecture* into *output*, which appears whole or not at all.

    Raises:
        subprocess.CalledProcessError: the compiler's words went to stderr.
    """
    sources = sorted(path.name for path in directory.glob("*.c"))
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    environment = {**os.environ, "ZIG_LOCAL_CACHE_DIR": str(scratch)}
    environment.setdefault("ZIG_GLOBAL_CACHE_DIR", str(scratch))
    try:
        # Relative names from inside the directory: no path of this machine can get into the program.
        compiler = [sys.executable, "-m", "ziglang", "cc", "-target", f"{architecture}-linux-musl"]
        subprocess.run(
            [*compiler, *FLAGS, *sources, "-o", str(temporary.resolve())],
            cwd=directory,
            env=environment,
            check=True,
        )
        temporary.chmod(0o755)
        temporary.rename(output)
    finally:
        temporary.unlink(missing_ok=True)


def build_all(root: Path) -> list[Path]:
    """Bring the directory ``bin`` beside each of the sources under *root* up to date and return the programs.

    Raises:
        SystemExit: the compiler is not installed; says how to get it.
    """
    return [built for directory, name in PROGRAMS.items() for built in _build(root, root / directory, name)]


def _build(root: Path, directory: Path, name: str) -> list[Path]:
    binaries = directory / "bin"
    binaries.mkdir(exist_ok=True)
    for unfinished in binaries.glob(f".{name}-*"):  # of builds that were killed; their suffix is their pid
        if not Path("/proc", unfinished.suffix.removeprefix(".")).exists():
            unfinished.unlink(missing_ok=True)
    digest = sources_digest(directory)
    built = []
    for architecture in ARCHITECTURES:
        output = binaries / f"{name}-{architecture}"
        stamp = binaries / f"{name}-{architecture}.sources"
        built.append(output)
        if output.is_file() and stamp.is_file() and stamp.read_text() == digest:
            continue
        if importlib.util.find_spec("ziglang") is None:
            sys.exit(f"The compiler of {name} is missing. Install it: pip install ziglang=={ZIG_VERSION}")
        # The first time, the compiler also makes a C library: half a minute or more. It keeps it here.
        print(f"Compiling {name} for {architecture}; half a minute the first time", file=sys.stderr, flush=True)
        compile_program(directory, architecture, output, scratch=root / ".zig-cache")
        stamp.write_text(digest)
    return built


if __name__ == "__main__":
    for program in build_all(Path(__file__).resolve().parent.parent):
        print(f"{program} ({program.stat().st_size} bytes)")
