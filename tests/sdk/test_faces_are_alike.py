"""The two faces have the same names, parameters and words: what one of them can, the other can."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest

import noid
import noid.sync
from noid.sdk.temporary import Temporary
from noid.sync.face import Face

PAIRS = [
    (getattr(noid, name), getattr(noid.sync, name))
    for name in ("Checkpoint", "Client", "Connection", "Console", "Events", "Log", "Process", "RunningProcess", "Vm")
]
COUNTERPARTS = {"__aenter__": "__enter__", "__aexit__": "__exit__", "__aiter__": "__iter__", "__anext__": "__next__"}
SET_BY_CONSTRUCTORS = {"vm", "info", "notices", "gaps"}


def public(kind: type[Any]) -> set[str]:
    """Return what a class offers, in the words of the synchronous face."""
    names = {name for name in dir(kind) if not name.startswith("_")}
    return names | {there for here, there in COUNTERPARTS.items() if hasattr(kind, here) or hasattr(kind, there)}


@pytest.mark.parametrize(("asynchronous", "synchronous"), PAIRS, ids=lambda kind: kind.__name__)
def test_every_method_has_its_counterpart_with_the_same_parameters_and_words(
    asynchronous: type[Any], synchronous: type[Any]
) -> None:
    assert public(asynchronous) == public(synchronous) - (SET_BY_CONSTRUCTORS - public(asynchronous))
    for name in public(asynchronous) - set(COUNTERPARTS.values()):
        here, there = inspect.getattr_static(asynchronous, name), inspect.getattr_static(synchronous, name)
        if isinstance(here, property):
            assert isinstance(there, property), name
            assert there.fget.__annotations__ == here.fget.__annotations__, name
            continue
        here, there = getattr(asynchronous, name), getattr(synchronous, name)
        assert inspect.signature(here) == inspect.signature(there), name
        assert inspect.getdoc(here) == inspect.getdoc(there), name
        assert not inspect.iscoroutinefunction(there), name
    assert inspect.signature(asynchronous.__init__) == inspect.signature(synchronous.__init__) or (
        synchronous.__init__ is Face.__init__
    )


def test_a_temporary_vm_is_one_for_both() -> None:
    assert hasattr(Temporary, "__aenter__")
    assert hasattr(noid.sync.Temporary, "__enter__")


def test_everything_the_sdk_exports_is_there_and_nothing_else_is() -> None:
    for module in (noid, noid.sync):
        for name in module.__all__:
            assert getattr(module, name) is not None
        with pytest.raises(AttributeError, match="has no attribute 'Elephant'"):
            module.Elephant  # noqa: B018
        assert set(module.__all__) <= set(dir(module)) | {
            "Connection",
            "Console",
            "Events",
            "Log",
            "Process",
            "RunningProcess",
        }


PROGRAM = """
import sys
import noid
assert not {name for name in sys.modules if name.startswith("noid.")}, "noid alone is to be nothing"
from noid.sync import Client
import noid.sync.streams
heavy = {"trio", "ssl", "http.client", "subprocess", "importlib.metadata", "asyncio"} & set(sys.modules)
assert not heavy, heavy
import noid.sdk.client
noid.Client()
assert "trio" in sys.modules
"""


def test_the_synchronous_face_imports_no_concurrency_framework(tmp_path: Any) -> None:
    env = {"PYTHONPATH": ":".join(filter(None, sys.path)), "HOME": str(tmp_path), "NOID_URL": "http://localhost:1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=env, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
