"""The shape of the tree, checked: imports flow one way, files say what they are for, and none grows without a word."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINES_MAX = 450

#: Files that are longer than `LINES_MAX`, each with its reason.
LONG_FILES: dict[str, str] = {
    "noid/core/backends.py": "every contract a backend fulfils, on one page, of which half is what its methods promise",
}

#: What the modules of a layer may import of noid: names of packages or modules. Layers are matched from the top.
LAYERS: dict[str, tuple[str, ...]] = {
    "noid/__init__.py": ("noid.client.completed", "noid.client.errors", "noid.client.event_stream", "noid.errors",
                         "noid.sdk"),
    "noid/__main__.py": ("noid.cli.start",),
    "noid/errors.py": (),
    "noid/hostfs.py": ("noid.errors",),
    "noid/hostextents.py": ("noid.errors",),
    "noid/rawdisk.py": ("noid.core.backends", "noid.core.model", "noid.errors", "noid.hostextents", "noid.hostfs"),
    "noid/vmmhost": ("noid.core.model", "noid.errors", "noid.hostextents", "noid.hostfs", "noid.vmmhost"),
    "noid/hookspecs.py": ("noid.core.backends", "noid.core.model"),
    "noid/core/model": ("noid.core.model", "noid.errors"),
    "noid/core/wire.py": ("noid.core.model", "noid.errors"),
    "noid/core/paths.py": ("noid.errors",),
    "noid/core": ("noid.__version__", "noid.core", "noid.errors", "noid.hookspecs", "noid.hostextents", "noid.hostfs"),
    "noid/client": ("noid.__version__", "noid.client", "noid.core.wire", "noid.core.model", "noid.core.paths",
                    "noid.errors"),
    "noid/sdk": ("noid.client", "noid.sdk", "noid.core.wire", "noid.core.model", "noid.errors"),
    "noid/sync": ("noid.client", "noid.sdk", "noid.sync", "noid.core.model"),
    "noid/cli": ("noid.__version__", "noid.cli", "noid.sync", "noid.client", "noid.core.wire", "noid.core.model",
                 "noid.core.paths", "noid.errors"),
    "noid/server": ("noid.__version__", "noid.server", "noid.core", "noid.errors", "noid.hookspecs",
                    "noid.hostextents", "noid.hostfs"),
    "noid/testing": ("noid",),
    "plugins": ("noid.core.backends", "noid.core.model", "noid.errors", "noid.hookspecs", "noid.hostextents",
                "noid.hostfs",
                "noid.rawdisk", "noid.vmmhost"),
}  # fmt: skip


def sources(*places: str) -> Iterator[Path]:
    for place in places:
        for path in sorted((ROOT / place).rglob("*.py")):
            if not any(part.startswith(".") or part == "build" for part in path.relative_to(ROOT).parts):
                yield path


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and full name of every import, also inside functions; of ``from a import b`` both names joined."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def own_package(path: Path) -> str | None:
    """Return the plugin package *path* is in, which may import itself."""
    parts = path.relative_to(ROOT).parts
    return parts[2] if parts[0] == "plugins" and len(parts) > 3 else None


def may_import(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name == layer or name.startswith(f"{layer}.") for layer in allowed)


FILES = [*sources("noid", "plugins")]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_flow_one_way(path: Path) -> None:
    layer = next(layer for layer in LAYERS if name_of(path) == layer or name_of(path).startswith(f"{layer}/"))
    wrong = []
    for line, name in imports_of(path):
        package = name.partition(".")[0]
        if package == "noid" and not may_import(name, LAYERS[layer]):
            wrong.append(f"{name_of(path)}:{line} imports {name}")
        if package.startswith("noid_") and package != own_package(path) and layer != "noid/testing":
            wrong.append(f"{name_of(path)}:{line} imports the plugin {package}")
        if package in ("plugins", "tests", "benchmarks"):
            wrong.append(f"{name_of(path)}:{line} imports {name}, which is a directory and no package")
    assert not wrong, f"{layer} may import of noid only {', '.join(LAYERS[layer]) or 'nothing'}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("module", ["quart", "hypercorn", "sqlite_utils"])
def test_the_command_line_needs_nothing_of_the_server_extra(module: str) -> None:
    for path in sources("noid/cli", "noid/client"):
        for line, name in imports_of(path):
            assert name.partition(".")[0] != module, f"{name_of(path)}:{line}"


def test_only_one_module_talks_to_pluggy_and_only_one_to_sqlite() -> None:
    """What a plugin keeps for itself is its own affair."""
    talks: dict[str, set[str]] = {"pluggy": set(), "sqlite3": set()}
    for path in sources("noid/core", "noid/server", "noid/cli", "noid/client"):
        for _, name in imports_of(path):
            talks.get(name.partition(".")[0], set()).add(name_of(path))
    assert talks == {"pluggy": {"noid/core/plugins.py"}, "sqlite3": {"noid/core/database/store.py"}}


@pytest.mark.parametrize("path", [*sources("noid", "plugins", "tests", "scripts", "benchmarks")], ids=name_of)
def test_a_file_says_in_its_first_line_what_it_is_for(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    first = (ast.get_docstring(tree) or "").partition("\n")[0]
    assert first.endswith((".", ":", "?")) or len(first) > 20, f"{name_of(path)} begins with {first!r}"
    begins = text.splitlines()[1 if text.startswith("#!") else 0]
    assert begins.startswith(('"""', 'r"""')), f"{name_of(path)} begins with {begins!r}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_is_short_or_has_a_reason(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    if name_of(path) in LONG_FILES:
        assert lines > LINES_MAX, f"{name_of(path)} has become short: take it from LONG_FILES"
    else:
        assert lines <= LINES_MAX, f"{name_of(path)} has {lines} lines: divide it, or give its reason in LONG_FILES"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_is_called_after_nothing(path: Path) -> None:
    assert path.stem not in {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
