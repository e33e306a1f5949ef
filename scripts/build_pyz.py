"""Makes the noid command a single file that any Python from 3.11 on runs: noid.pyz, and noid.pyz.sha256 beside it.

A zip archive with the command's own modules, found by what they import, and the packages of pyz-requirements.txt. Each
module is there as source and, beside it, compiled by the Python that builds: that one starts from bytecode, others
from the source. Equal sources and an equal Python make equal bytes.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import io
import py_compile
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
REQUIREMENTS = ROOT / "scripts" / "pyz-requirements.txt"
SHEBANG = b"#!/usr/bin/env python3\n"
LONG_AGO = (1980, 1, 1, 0, 0, 0)
ELSEWHERE = {"trio"}  # modules that import it are left out: they are the SDK's, and no command uses them
MAIN = """\
import sys

if sys.version_info < (3, 11):
    sys.exit("Error: noid needs Python 3.11 or newer, and this is %d.%d." % sys.version_info[:2])
from noid.cli.start import main

main()
"""


def main() -> None:
    """Build it."""
    parser = argparse.ArgumentParser(description="Make the noid command a single file.")
    parser.add_argument("--output", type=Path, default=ROOT / "dist" / "noid.pyz", help="default: dist/noid.pyz")
    output: Path = parser.parse_args().output
    with tempfile.TemporaryDirectory(prefix="noid-pyz-") as scratch:
        packages = Path(scratch) / "packages"
        _install_packages(packages)
        files = {**_own_files(packages), **_package_files(packages), "__main__.py": MAIN.encode()}
        content = _archive(files, Path(scratch))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(content)
    output.chmod(0o755)
    checksum = hashlib.sha256(content).hexdigest()
    output.with_name(f"{output.name}.sha256").write_text(f"{checksum}  {output.name}\n")
    print(f"{output}: {len(content) >> 10} KiB, {len(files)} files, Python {sys.version_info[0]}.{sys.version_info[1]}")


def _install_packages(place: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        sys.exit(f"{sys.executable} has no pip, which fetches the packages. Install it: apt-get install python3-pip")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile"]
    exact = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--requirement", str(REQUIREMENTS)]
    done = subprocess.run([*pip, *exact, "--target", str(place)], check=False)
    if done.returncode != 0:
        sys.exit("pip could not fetch what belongs into the single file; its last words are above.")


def _own_files(packages: Path) -> dict[str, bytes]:
    """Return noid's modules that its command can come to import, by their path in the archive."""
    files: dict[str, bytes] = {}
    waiting = [path.relative_to(ROOT) for path in (ROOT / "noid" / "cli").glob("*.py")]
    while waiting:
        path = waiting.pop()
        if str(path) in files:
            continue
        content = (ROOT / path).read_bytes()
        names = list(_imports(ast.parse(content)))
        if ELSEWHERE & {name.partition(".")[0] for name in names}:
            continue
        files[str(path)] = content
        waiting += [parent / "__init__.py" for parent in path.parents if parent.parts]
        for name in names:
            top = name.partition(".")[0]
            if top == "noid":
                waiting += _modules(name)
            elif not (top in sys.stdlib_module_names or (packages / top).exists()):
                sys.exit(f"{path} imports {name}, which is not in {REQUIREMENTS.name}.")
    return files


def _modules(name: str) -> list[Path]:
    """Return the file of the module *name*, or of the one that has it as a member."""
    path = Path(*name.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if (ROOT / candidate).is_file():
            return [candidate]
    return _modules(name.rpartition(".")[0])


def _imports(node: ast.AST) -> Iterator[str]:
    """Yield what is imported, also inside functions, but not for the type checker alone."""
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from _imports(child)


def _package_files(packages: Path) -> dict[str, bytes]:
    """Return the modules of the packages, their licences, and the metadata without which looking for others fails."""
    wanted = [path for path in packages.rglob("*.py") if "tests" not in path.relative_to(packages).parts]
    wanted += [*packages.glob("*.dist-info/licenses/*"), *packages.glob("*.dist-info/METADATA")]
    found = {str(path.relative_to(packages)): path.read_bytes() for path in wanted}
    native = [path.name for path in packages.rglob("*.so")]
    if native:
        sys.exit(f"a single file cannot have libraries of machine code inside: {', '.join(native)}")
    return found


def _archive(files: dict[str, bytes], scratch: Path) -> bytes:
    target = io.BytesIO()
    target.write(SHEBANG)
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in sorted(files.items()):
            _put(archive, name, content)
            if name.endswith(".py"):
                _put(archive, f"{name}c", _compiled(name, content, scratch))
    return target.getvalue()


def _put(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(name, LONG_AGO)
    entry.external_attr = 0o644 << 16
    archive.writestr(entry, content, zipfile.ZIP_DEFLATED, 9)


def _compiled(name: str, content: bytes, scratch: Path) -> bytes:
    """Return the bytecode of a module; it is never compared with the source, of which it cannot be another's."""
    source, compiled = scratch / "source.py", scratch / "compiled.pyc"
    source.write_bytes(content)
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(source), str(compiled), dfile=name, doraise=True, invalidation_mode=mode)
    return compiled.read_bytes()


if __name__ == "__main__":
    main()
