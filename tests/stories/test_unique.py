"""What makes clones their own: twenty at once have nothing in common, and strictness hands out nothing less."""

from __future__ import annotations

import shlex
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

House = Any  # see conftest.py
pytestmark = pytest.mark.vm

CLONES = 20
HOOKS = "/etc/noid/restore.d"
#: Runs in the checkpoint: looks without a pause, and draws at the first moment it can know that it is a clone.
WATCH = (
    "read own < /run/noid/generation; now=$own; echo > /dev/shm/watching; "
    'while [ "$now" = "$own" ]; do read now < /run/noid/generation; done; '
    "od -An -tx1 -N16 /dev/urandom > /dev/shm/drawn; mv /dev/shm/drawn /dev/shm/earliest"
)
FACTS = (
    "until [ -s /dev/shm/earliest ]; do sleep 0.02; done; "
    "cat /dev/shm/earliest /proc/sys/kernel/random/uuid; od -An -tx1 -N16 /dev/urandom; "
    "hostname; cat /etc/machine-id /proc/sys/kernel/random/boot_id /run/noid/generation"
)


@pytest.mark.deadline(300)
def test_twenty_clones_of_one_checkpoint_have_nothing_in_common(noid: House) -> None:
    noid.create("web")
    watch = f"setsid sh -c {shlex.quote(WATCH)} >/dev/null 2>&1 </dev/null & until [ -e /dev/shm/watching ]; do :; done"
    noid.guest("web", watch)
    checkpoint = noid.checkpoint("web")
    noid.ok("destroy", "web")

    def facts(number: int) -> tuple[list[str], list[str]]:
        body = {"checkpoint_id": checkpoint, "new_name": f"clone-{number}"}
        status, woken = noid.http("POST", "/v1/vms/web/restore", body)
        assert status == 200, woken
        status, done = noid.http("POST", f"/v1/vms/clone-{number}/exec", {"command": ["sh", "-c", FACTS]})
        assert (status, done["exit_code"]) == (200, 0), done
        assert noid.http("DELETE", f"/v1/vms/clone-{number}")[0] == 204
        lacking = [item["name"] for item in woken["receipt"] if item["required"] and item["status"] != "done"]
        return done["stdout"].strip().splitlines(), lacking

    with ThreadPoolExecutor(2) as pool:
        seen = list(pool.map(facts, range(CLONES)))
    assert [lacking for _, lacking in seen] == [[]] * CLONES
    assert {len(lines) for lines, _ in seen} == {7}
    for kind in zip(*(lines for lines, _ in seen), strict=True):
        assert len(set(kind)) == CLONES, kind


def test_where_uniqueness_is_required_a_clone_that_lacks_something_is_not_handed_out(house: House) -> None:
    house.settings('require_unique = "strict"\n[pool]\nsize = 0\n')
    house.create("web")
    house.guest(
        "web", f"mkdir -p {HOOKS}; printf '#!/bin/sh\\necho no licence for $NOID_VM; exit 9\\n' > {HOOKS}/50-licence"
    )
    house.guest("web", f"chmod 755 {HOOKS}/50-licence")
    checkpoint = house.checkpoint("web")
    house.guest("web", "echo after > /dev/shm/word")

    said = house("restore", "web", checkpoint, "--as", "copy").complaint
    assert "hook:50-licence failed (no licence for copy)" in said
    assert "No VM was made" in said
    said = house("restore", "web", checkpoint).complaint
    assert "no licence for web" in said
    assert "The VM runs on as it was" in said
    assert house.states() == {"web": "running"}
    assert house.guest("web", "cat /dev/shm/word") == "after"
    assert len(house.machines()) == 1

    status, answer = house.http("POST", "/v1/vms/web/restore", {"checkpoint_id": checkpoint})
    assert (status, answer["code"]) == (500, "not_unique")
    house.guest("web", f"printf '#!/bin/sh\\n' > {HOOKS}/50-licence")
    house.ok("restore", "web", house.checkpoint("web"), "--as", "copy")


def test_what_a_clone_lacks_is_said_where_it_is_made_and_where_it_is_shown(noid: House) -> None:
    noid.create("web")
    noid.guest("web", f"mkdir -p {HOOKS}; echo > {HOOKS}/10-forgotten; mount -t tmpfs -o ro none /run/noid")
    checkpoint = noid.checkpoint("web")
    restored = noid.ok("restore", "web", checkpoint, "--as", "copy").splitlines()
    lines = [line for line in restored if line.startswith("Not its own: ")]
    assert any(line.startswith("Not its own: generation not possible") for line in lines), restored
    assert "Not its own: hook:10-forgotten failed: not an executable file" in lines
    shown = noid.ok("info", "copy").splitlines()
    assert set(lines) <= set(shown)
    assert any(line.startswith("Receipt:") for line in shown)
