"""What ``--json`` prints of the server's is what the server's own description of its API promises."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints
from unittest.mock import Mock

import jsonschema_rs
import pytest

from noid.cli import main
from noid.client import answers
from noid.server.openapi import document
from noid.server.serve import all_routes
from noid.testing.served import PATIENCE_SECS, SIMULATED, Served
from noid.testing.simulated_agent import give_default_image

DOCUMENT = document(all_routes(Mock(), Mock(), Mock()))
SHOWN = {
    answers.VmInfo: ("post", "/v1/vms/{name}/stop"),
    answers.CheckpointInfo: ("post", "/v1/vms/{name}/checkpoints"),
    answers.ProcessInfo: ("get", "/v1/vms/{name}/processes/{process}"),
    answers.OperationInfo: ("get", "/v1/operations/{operation}"),
    answers.Quota: ("get", "/v1/quota"),
    answers.Identity: ("get", "/v1/whoami"),
    answers.ExecInfo: ("post", "/v1/vms/{name}/exec"),
    answers.ServerVersion: ("get", "/version"),
}


def schema_of(method: str, path: str) -> dict[str, Any]:
    """The schema of what the route answers; the document's references resolve in it."""
    responses = DOCUMENT["paths"][path][method]["responses"]
    status = next(status for status in ("200", "201") if status in responses)
    schema = responses[status]["content"]["application/json"]["schema"]
    return {"components": DOCUMENT["components"]} | schema


def fields_of(schema: dict[str, Any]) -> dict[str, Any]:
    """All properties of the object that *schema* describes."""
    if "$ref" in schema:
        schema = DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    merged: dict[str, Any] = dict(schema.get("properties", {}))
    for part in schema.get("allOf", ()):
        merged |= fields_of(part)
    return merged


class Printed:
    """The command line in front of a server on simulated VMs."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self, *words: str) -> Any:
        assert main.run(["--json", *words]) == 0, self._capfd.readouterr().err
        return json.loads(self._capfd.readouterr().out)

    def by(self, method: str, path: str, *words: str) -> Any:
        """Run *words*, and hold what is printed against what the route answers."""
        printed = self(*words)
        self.is_of(method, path, printed)
        return printed

    @staticmethod
    def is_of(method: str, path: str, value: Any) -> None:
        schema = schema_of(method, path)
        errors = [str(error) for error in jsonschema_rs.Draft202012Validator(schema).iter_errors(value)]
        assert errors == [], value
        for each in value if isinstance(value, list) else [value]:
            assert each.keys() <= fields_of(schema.get("items", schema)).keys(), "fields that are described nowhere"


@pytest.fixture
def printed(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Printed]:
    (data_dir / "server.toml").write_text(SIMULATED)
    give_default_image(data_dir)
    for name in ("NOID_URL", "NOID_SERVER", "NOID_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NOID_DATA_DIR", str(data_dir))
    monkeypatch.chdir(tmp_path)
    served = Served(data_dir)
    process = served.start("--local")
    try:
        yield Printed(capfd)
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE_SECS)


def test_what_commands_print_of_the_server_is_what_its_routes_promise(printed: Printed) -> None:
    vm, vms = "/v1/vms/{name}", "/v1/vms"
    checkpoints, processes = f"{vm}/checkpoints", f"{vm}/processes"
    printed.by("post", vms, "create", "web", "--mem", "128", "--label", "tier=front")
    printed.by("get", vm, "info", "web")
    printed.by("get", vms, "list")
    printed.by("patch", vm, "label", "web", "team=infra")
    printed.by("post", f"{vm}/pause", "pause", "web")
    printed.by("post", f"{vm}/resume", "resume", "web")
    point = printed.by("post", checkpoints, "checkpoint", "web", "--label", "clean")["id"]
    printed.by("patch", f"{checkpoints}/{{checkpoint}}", "label", "--checkpoint", f"web/{point}", "kept=yes")
    printed.by("get", checkpoints, "checkpoints", "web")
    printed.by("get", "/v1/checkpoints", "checkpoints", "--all")
    printed.by("post", f"{vm}/restore", "restore", "web", point)
    printed.by("post", f"{vm}/restore", "restore", "web", point, "--as", "copy")
    forked = printed("fork", "web", "--as", "twin")
    assert forked.keys() == {"source", "vms", "failed", "checkpoint"}
    for twin in forked["vms"]:
        Printed.is_of("post", f"{vm}/restore", twin)
    process = printed.by("post", processes, "exec", "web", "-d", "--", "true")["id"]
    printed.by("get", processes, "ps", "web")
    printed.by("get", f"{processes}/{{process}}/wait", "wait", "web", process)
    printed.by("get", vm, "wait", "web", "--for", "running")
    done = printed.by("get", "/v1/operations", "operations")
    printed.by("get", "/v1/operations/{operation}", "operations", done[0]["id"])
    printed.by("get", "/v1/quota", "quota")
    printed.by("get", "/v1/whoami", "whoami")
    printed.by("post", f"{vm}/reboot", "reboot", "web")
    printed.by("post", f"{vm}/stop", "stop", "web")
    printed.by("post", f"{vm}/start", "start", "web")
    printed.by("patch", vm, "rename", "web", "www")


@pytest.mark.parametrize("shape", SHOWN, ids=lambda shape: shape.__name__)
def test_what_the_client_counts_on_is_described(shape: type) -> None:
    schema = schema_of(*SHOWN[shape])
    assert get_type_hints(shape).keys() <= fields_of(schema).keys()
