"""The reference pages and the code say the same, in both directions: whoever changes one has to change the other."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import itertools
import json
import re
import sqlite3
import sys
import types
import typing
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import pytest
from noid_auth_token.tokens import open_tokens

from noid import errors, hookspecs
from noid.cli import main as noid_cli
from noid.core.config.settings import NOT_FROM_FILE, Config
from noid.core.database.store import open_store
from noid.core.model.storage import Checkpoint
from noid.core.model.vms import Vm, VmState
from noid.core.plugins import _ENTRY_PREFIX, KINDS, Plugins
from noid.core.vms import states
from noid.core.wire import request_from_json
from noid.server import command as server_command
from noid.server.rest import checkpoint_fields, vm_fields
from noid.server.schemas.checkpoints import CHECKPOINT
from noid.server.schemas.logs import LOG
from noid.server.schemas.processes import PROCESS
from noid.server.schemas.tokens import TOKEN
from noid.server.schemas.vms import VM
from noid.server.schemas.vocabulary import JSON, Content, Record
from noid.server.serve import all_routes

ROOT = Path(__file__).parents[2]
Page = Any  # see conftest.py
Pages = Callable[[str], Page]


def sources() -> Iterator[Path]:
    for place in ("noid", "plugins", "benchmarks"):
        yield from sorted((ROOT / place).rglob("*.py"))


# --- errors ----------------------------------------------------------------------------------------------------------


def all_errors(base: type[errors.NoidError] = errors.NoidError) -> Iterator[type[errors.NoidError]]:
    yield base
    for below in base.__subclasses__():
        if below.__module__ == "noid.errors":
            yield from all_errors(below)


def test_every_error_has_its_code_status_and_class_on_the_page(page: Pages) -> None:
    documented = [row[:3] for row in page("docs/errors.md").rows("code", "status", "class in `noid.errors`", "when")]
    assert sorted(documented) == sorted((e.code, str(e.status), e.__name__) for e in all_errors())


def test_no_two_errors_share_a_code() -> None:
    codes = [error.code for error in all_errors()]
    assert len(codes) == len(set(codes))


# --- configuration ---------------------------------------------------------------------------------------------------

TYPES = {Path: "path", str: "string", int: "integer", float: "number", bool: "boolean", tuple: "array of strings"}


def keys_of(record: type[Any]) -> list[tuple[str, str, str]]:
    """Return key, type and default of *record*'s fields as the page writes them; without sections."""
    found = []
    for name, hint in typing.get_type_hints(record).items():
        field = {f.name: f for f in dataclasses.fields(record)}[name]
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            possible = [a for a in typing.get_args(hint) if a is not type(None)]
        else:
            possible = [hint]
        kind = " or ".join(TYPES.get(typing.get_origin(each) or each, "") for each in possible) or None
        if kind is None or name in NOT_FROM_FILE:
            continue
        value = list(field.default) if isinstance(field.default, tuple) else field.default
        shown = "none" if value is None else "see above" if value is dataclasses.MISSING else json.dumps(value)
        found.append((name, kind, shown))
    return found


def test_every_setting_has_its_type_and_default_on_the_page(page: Pages) -> None:
    configuration, header = page("docs/configuration.md"), ("key", "type", "default", "meaning")
    sections: dict[str, type[Any]] = {"Top level": Config}
    for field in dataclasses.fields(Config):
        if isinstance(field.default_factory, type) and dataclasses.is_dataclass(field.default_factory):
            sections[f"[{field.name}]"] = field.default_factory
    bare = []
    for kind in KINDS:
        for name, spec in Plugins().offers(kind).items():
            section = f"{_ENTRY_PREFIX[kind]}_{name}"
            if dataclasses.fields(spec.config):
                sections[f"[plugins.{section}]"] = spec.config
            else:
                bare.append(section)
    headings = re.findall(r"^## (Top level|\[.*\])$", configuration.text, re.MULTILINE)
    assert sorted(headings) == sorted(sections)
    for title, record in sections.items():
        assert [row[:3] for row in configuration.section(title).rows(*header)] == keys_of(record), title
    said = re.search(r"The other bundled plugins \((.*?)\) have nothing to set", configuration.text)
    assert said is not None
    assert said[1].replace("`", "").split(", ") == sorted(bare)


def test_every_environment_variable_is_on_the_page(page: Pages) -> None:
    documented = {row[0] for row in page("docs/configuration.md").rows("variable", "meaning")}
    used = {name for path in sources() for name in re.findall(r"\bNOID_[A-Z_]+\b", path.read_text())}
    assert documented == used


# --- hooks -----------------------------------------------------------------------------------------------------------


def test_every_hook_is_on_the_page_with_its_exact_signature(page: Pages) -> None:
    hooks = {name: function for name, function in vars(hookspecs).items() if hasattr(function, "noid_spec")}
    exact = [f"def {name}{inspect.signature(hook)}".replace("'", "") for name, hook in hooks.items()]
    block = next(block for block in page("docs/plugins.md").blocks("python") if "def vmm_backend" in block)
    assert [line for line in block.splitlines() if line.startswith("def ")] == exact
    explained = page("docs/plugins.md").rows("hook", "when, and what its answer means")
    names = {name for row in explained for name in row[0].replace("`", "").split(", ")}
    assert names == hooks.keys()


# --- HTTP ------------------------------------------------------------------------------------------------------------


NOTHING = typing.cast("Any", object())
ROUTES = all_routes(NOTHING, NOTHING, NOTHING)


def test_every_route_is_on_the_page_with_its_body_and_answers(page: Pages) -> None:
    rows = page("docs/http.md").rows("method", "path", "body", "success")
    assert sorted(row[:2] for row in rows) == sorted((route.method, route.path) for route in ROUTES)
    table = {(route.method, route.path): route for route in ROUTES}
    for method, path, body, success in rows:
        route = table[method, path]
        statuses = {int(status) for status in re.findall(r"\b[1-5]\d\d\b", success)}
        assert route.answers.keys() <= statuses <= route.answers.keys() | route.failures, f"{method} {path}"
        content = route.body if isinstance(route.body, Content) else Content(media={JSON: route.body or {}})
        assert (body == "") == (route.body is None), f"{method} {path}"
        assert ("may be missing" in body) == (not content.required), f"{method} {path}"
        fields = re.findall("`([a-z_]+)`", re.sub(r"\(.*?\)", "", body))
        if fields:
            record = content.media[JSON]
            assert isinstance(record, Record)
            assert fields == list(record.schema["properties"]), f"{method} {path}"


def test_the_objects_on_the_page_have_the_fields_they_really_have(page: Pages) -> None:
    now = datetime.now(UTC)
    vm = Vm(
        id="i", owner="o", name="web", state=VmState.RUNNING, generation=1, cpus=1, mem_mib=1, image="default",
        instance="x", created_at=now,
    )  # fmt: skip
    checkpoint = Checkpoint(
        id="i", owner="o", vm_id="v", vm_name="web", label=None, cpus=1, mem_mib=1, image="default", parent=None,
        created_at=now,
    )  # fmt: skip
    http = page("docs/http.md")
    assert list(json.loads(http.section("VM").blocks("json")[0])) == list(vm_fields(vm))
    assert list(json.loads(http.section("Checkpoint").blocks("json")[0])) == list(checkpoint_fields(checkpoint))
    for section, record in (
        ("VM", VM),
        ("Checkpoint", CHECKPOINT),
        ("Processes", PROCESS),
        ("Logs", LOG),
        ("Token", TOKEN),
    ):
        assert list(json.loads(http.section(section).blocks("json")[0])) == list(record.schema["properties"]), section
    command = http.section("Exec").blocks("json")[0]
    request = request_from_json(command)
    assert (request.argv[0], request.cwd, request.user, request.stdin, request.timeout_secs) == (
        "sh", "/srv", "noid", True, 60,
    )  # fmt: skip


def test_every_state_is_on_the_page_with_what_can_be_done_in_it(page: Pages) -> None:
    order = ("exec", "checkpoint", "restore", "pause", "resume", "stop", "start", "reboot", "destroy")
    documented = {row[0]: row[2] for row in page("docs/http.md").rows("state", "meaning", "what can be done")}
    assert documented.keys() == set(VmState)
    for state, text in documented.items():
        allowed = [action for action in order if VmState(state) in states.ALLOWED[action]]
        assert [action for action in order if action in text.split("which")[0]] == allowed, state


# --- commands --------------------------------------------------------------------------------------------------------

EVERYWHERE = {"--help", "--version", "--json", "--server", "--local", "--config", "--data-dir"}


WITH_JSON = {
    ("noid-server", "image", "list"),
    ("noid-server", "token", "list"),
    ("noid-server", "audit"),
    ("noid-server", "doctor"),
    ("noid-server", "quota"),
}


def leaves(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield every command that is no group, or a group that does something by itself, with its full name."""
    if isinstance(command, click.Group):
        if command.invoke_without_command and len(path) > 1:
            yield path, command
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from leaves(found, (*path, name))
    else:
        yield path, command


def all_commands() -> list[tuple[tuple[str, ...], click.Command]]:
    return [*leaves(noid_cli.cli, ("noid",)), *leaves(server_command.cli, ("noid-server",))]


def test_every_command_of_the_server_is_on_the_page_with_all_its_options(page: Pages) -> None:
    documented = {}
    for row in page("docs/commands.md").rows("command", "what it does"):
        words = row[0].split(" -- ")[0].split()
        name = tuple(itertools.takewhile(lambda word: not re.match(r"\[|--|[A-Z]", word), words))
        documented[name] = {word.strip("[]") for word in words if "--" in word}
    real = {}
    for path, command in leaves(server_command.cli, ("noid-server",)):
        options = {max(p.opts, key=len) for p in command.params if isinstance(p, click.Option) and not p.hidden}
        extra = {"--local"} if path == ("noid-server", "serve") else set()
        extra |= {"--json"} if path in WITH_JSON else set()
        real[path] = (options - EVERYWHERE) | extra
    assert documented == real


def test_the_page_of_every_command_is_what_their_help_says_now() -> None:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "scripts" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    assert reference.PAGE.read_text() == reference.reference(), "run: scripts/reference"


def test_the_page_says_what_every_command_prints_as_json(page: Pages) -> None:
    rows = page("docs/commands.md").section("JSON").rows("command", "what it prints")
    documented = {
        tuple(name.strip(" `").split()): cell for row in rows for name in row[0].split(",") for cell in row[1:]
    }
    commands = dict(leaves(noid_cli.cli, ("noid",)))
    assert documented.keys() == {path[1:] for path in commands}
    for path, cell in documented.items():
        callback = inspect.unwrap(commands["noid", *path].callback or (lambda: None))
        written = inspect.getsource(sys.modules[callback.__module__])
        written += (ROOT / "noid/cli/exec.py").read_text() if path == ("run",) else ""
        for field in re.findall(r"`(\w+)`", cell):
            if path != ("cp",):
                assert re.search(rf'"{field}"|\b{field}=', written), f"noid {' '.join(path)} says nothing of {field!r}"


def test_the_options_every_command_has_are_where_the_page_says(page: Pages) -> None:
    without_server = {("noid", "use"), ("noid", "bench")}
    without_server |= {("noid", "bench", what) for what in ("server", "cli", "firecracker")}
    without_server |= {("noid", "auth", name) for name in ("setup", "list", "switch", "logout")}
    without_server |= {("noid", "config", name) for name in ("set", "get", "list", "unset")}
    without_server |= {("noid", "update"), ("noid", "completion")}
    for path, command in all_commands():
        options = {opt for p in command.params for opt in p.opts}
        if path[0] == "noid":
            assert "--json" in options, path
            assert ({"--server", "--local"} <= options) == (path not in without_server), path
        else:
            assert ({"--config", "--data-dir"} <= options) == (path != ("noid-server", "plugins")), path


@pytest.mark.parametrize("path", [path for path, _ in all_commands()], ids=" ".join)
def test_the_help_of_a_command_fits_a_screen_and_ends_with_an_example(path: tuple[str, ...]) -> None:
    command = dict(all_commands())[path]
    text = command.get_help(click.Context(command, info_name=" ".join(path), terminal_width=80))
    lines = text.splitlines()
    assert len(lines) <= (24 if path[0] == "noid" else 34), f"{len(lines)} lines"
    assert max(map(len, lines)) <= 80
    assert "\\b" not in text
    assert " ".join(path) in text.partition("Examples:\n")[2]


def test_the_exit_codes_on_the_page_are_those_of_the_command_line(page: Pages) -> None:
    documented = [row[0] for row in page("docs/commands.md").rows("code", "meaning")]
    table = str(noid_cli.__doc__)
    named = re.findall(r"^([0-9, ]+|other) {2,}", table, re.MULTILINE)
    assert documented == [code.strip() for cell in named for code in cell.split(",")]


# --- what is on disk -------------------------------------------------------------------------------------------------


def test_the_schema_on_the_page_is_the_schema(page: Pages, tmp_path: Path) -> None:
    database = tmp_path / "noid.db"
    with open_store(database):
        pass
    open_tokens(database).close()
    connection = sqlite3.connect(database)
    try:
        rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY rowid").fetchall()
    finally:
        connection.close()
    real = [plain(sql) for name, sql in rows if not name.startswith("sqlite_") and "_migrations" not in name]
    (block,) = page("docs/operations.md").blocks("sql")
    assert [plain(statement) for statement in re.split(r";\s*(?=CREATE |\Z)", block) if statement] == real


def plain(sql: str) -> str:
    return re.sub(r"\s+", " ", sql).replace("( ", "(").strip()


# --- messages, figures, links ----------------------------------------------------------------------------------------


def texts() -> str:
    """Return every string in the source, one a line, with a mark where a value is put in."""
    found = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_every_message_people_are_told_to_look_for_is_one_noid_says(page: Pages) -> None:
    said = texts()
    for message, _ in page("docs/operations.md").rows("message", "what to do"):
        assert message in said, f"noid nowhere says {message!r}"


def test_every_figure_of_the_bench_is_on_its_page_with_its_bounds(page: Pages) -> None:
    trees = [ast.parse(path.read_bytes()) for path in sorted((ROOT / "benchmarks/noid_bench").glob("*.py"))]
    real = {}
    for call in itertools.chain.from_iterable(map(ast.walk, trees)):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Figure":
            said = {word.arg: word.value for word in call.keywords}
            bounds = [ast.literal_eval(said[key]) if key in said else None for key in ("must", "aim")]
            name = said["name"]
            if isinstance(name, ast.JoinedStr):
                for storage in ("overlay", "btrfs"):
                    real[f"checkpoint pause, {storage}"] = bounds
            else:
                real[ast.literal_eval(name)] = bounds
    rows = page("docs/benchmarks.md").rows("figure", "must", "aim", "floor")
    assert {row[0]: [float(cell.split()[0]) if cell else None for cell in row[1:3]] for row in rows} == real


@pytest.mark.parametrize("name", ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))])
def test_no_link_leads_nowhere(page: Pages, name: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page(name).text):
        file, _, anchor = target.partition("#")
        if file.startswith("http"):
            continue
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), f"{name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{name} links to {target}"


def test_every_page_can_be_reached_from_the_readme(page: Pages) -> None:
    linked = set(re.findall(r"\]\((docs/[^)#]+)", page("README.md").text))
    assert linked >= {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
