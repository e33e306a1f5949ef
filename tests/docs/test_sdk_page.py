"""docs/sdk.md: its programs run, and its reference is what the code says."""

from __future__ import annotations

import ast
import inspect
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

import noid
from noid.testing.served import SIMULATED, Served
from noid.testing.simulated_agent import give_default_image

ROOT = Path(__file__).parents[2]
CLASSES = ("Client", "Vm", "Completed", "RunningProcess", "Process", "Checkpoint", "Console", "Log")
PROGRAMS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "sdk.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def served(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (data_dir / "server.toml").write_text(SIMULATED)
    give_default_image(data_dir)
    served = Served(data_dir)
    process = served.start("--local")
    monkeypatch.setenv("NOID_URL", f"unix://{data_dir / 'run' / 'agent.sock'}")
    yield
    process.terminate()
    served.end(process)


async def test_the_programs_on_the_page_do_what_they_say(served: None) -> None:
    assert len(PROGRAMS) > 5
    names: dict[str, Any] = {}
    for program in PROGRAMS:
        code = compile(program, "docs/sdk.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        function = types.FunctionType(code, names)
        with trio.fail_after(30):
            if inspect.iscoroutinefunction(function):
                await function()
            else:
                await trio.to_thread.run_sync(function)


def rows(kind: type[Any]) -> Iterator[tuple[str, str]]:
    """Yield each public method as it is called, and the first sentence of what it says of itself."""
    for name, method in inspect.getmembers(kind, inspect.isroutine):
        if not name.startswith("_"):
            shown = [f"{each}" for each in parameters(method)]
            first = re.split(r"\.(?:\s|$)", " ".join((inspect.getdoc(method) or "").split()))[0]
            yield f"{name}({', '.join(shown)})", first


def parameters(method: Callable[..., Any]) -> Iterator[str]:
    star = False
    for each in inspect.signature(method).parameters.values():
        if each.name == "self":
            continue
        if each.kind is each.KEYWORD_ONLY and not star:
            star = True
            yield "*"
        yield each.name if each.default is each.empty else f"{each.name}={each.default!r}"


@pytest.mark.parametrize("name", CLASSES)
def test_every_method_is_on_the_page_as_it_is_called_and_with_its_first_sentence(page: Any, name: str) -> None:
    documented = page("docs/sdk.md").section(name).rows("method", "what it does")
    expected = sorted(rows(getattr(noid, name)))
    hint = "\n".join(f"| `{call}` | {what} |" for call, what in expected)
    assert sorted(documented) == expected, f"The table is to be:\n{hint}"


def test_every_name_that_can_be_imported_is_on_the_page(page: Any) -> None:
    text = page("docs/sdk.md").text
    assert [name for name in noid.__all__ if name != "__version__" and name not in text] == []
