"""Processes of a VM: started without a client, listed, waited for, ended."""

from __future__ import annotations

import json

from noid.client.answers import ExecInfo, ProcessInfo
from noid.client.calls.call import Call, listed, nothing, one, with_query


def every(name: str) -> Call[list[ProcessInfo]]:
    """Ask for the processes of the VM *name*, oldest first."""
    return listed(f"/v1/vms/{name}/processes", ProcessInfo)


def get(name: str, process: str) -> Call[ProcessInfo]:
    """Ask for one process; refused with 404 if there is none."""
    return Call(method="GET", path=f"/v1/vms/{name}/processes/{process}", understand=one(ProcessInfo))


def start(name: str, command: str) -> Call[ProcessInfo]:
    """Start a process that runs on without a client. *command* is `noid.core.wire.request_to_json` of it."""
    path = f"/v1/vms/{name}/processes"
    return Call(method="POST", path=path, body=json.loads(command), quick=False, understand=one(ProcessInfo))


def run(name: str, command: str) -> Call[ExecInfo]:
    """Run a short command to its end. *command* is `noid.core.wire.request_to_json` of it."""
    path = f"/v1/vms/{name}/exec"
    return Call(method="POST", path=path, body=json.loads(command), quick=False, understand=one(ExecInfo))


def wait(name: str, process: str, *, at_most_secs: float) -> Call[ProcessInfo]:
    """Ask for the process when it has ended, or after *at_most_secs* as it is then; 404 if there is none."""
    path = with_query(f"/v1/vms/{name}/processes/{process}/wait", timeout_secs=f"{at_most_secs:g}")
    return Call(method="GET", path=path, quick=False, understand=one(ProcessInfo))


def send_signal(name: str, process: str, signal: str | int) -> Call[None]:
    """Send *signal* to the process' group; an ended one does not mind."""
    path = f"/v1/vms/{name}/processes/{process}/signal"
    return Call(method="POST", path=path, body={"signal": signal}, understand=nothing)


def end(name: str, process: str) -> Call[None]:
    """End the process if it runs, and forget it and its output."""
    path = f"/v1/vms/{name}/processes/{process}"
    return Call(method="DELETE", path=path, quick=False, understand=nothing)
