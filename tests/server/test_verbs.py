"""What is done to VMs and checkpoints over HTTP: pause and resume, labels and names, checkpoints one by one, lists."""

from __future__ import annotations

from typing import Any

Server = Any  # see conftest.py


async def test_pause_and_resume_answer_with_the_vm_and_exec_between_them_says_what_to_do(web: Server) -> None:
    for _ in range(2):
        paused = await web.ask("POST", "/v1/vms/web/pause")
        assert (paused.status, paused.json()["state"], paused.json()["responding"]) == (200, "paused", None)
    assert paused.json()["timings"] == {}
    refused = await web.refused("POST", "/v1/vms/web/exec", {"command": ["true"]})
    assert refused == (409, "conflict", "cannot exec VM 'web': it is paused. Resume it with `noid resume web`.")
    assert (await web.ask("GET", "/v1/vms/web/logs/console")).status == 200
    for _ in range(2):
        resumed = await web.ask("POST", "/v1/vms/web/resume")
        assert (resumed.status, resumed.json()["state"]) == (200, "running")
    assert (await web.run("true"))["exit_code"] == 0
    assert (await web.refused("POST", "/v1/vms/other/pause"))[0] == 404
