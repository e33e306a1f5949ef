"""The image's own programs after a wake, in a real guest: whatever they do, the receipt comes and says so."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
import trio
from noid_exec_vsock.guest import AgentGuest

from noid.core.model.vms import Identity, NetLease, ReceiptItem, WakeReason
from noid.testing.vmm_rig import VmmRig, run

from .test_agent_in_a_vm import image, rig

__all__ = ["image", "rig"]  # fixtures

pytestmark = pytest.mark.vm
HOOKS = "/etc/noid/restore.d"
LIMIT_SECS = 2.0
TRUE = "/run/true"  # busybox goes by its name
#: Stands in for OpenSSH's, which the tiny guest has not: makes a key, or shows the print of one.
KEYGEN = """#!/bin/sh
[ "$1" != -lf ] || { echo 256 "$(cat "$2")" comment; exit; }
for file; do :; done
echo secret > "$file"; echo "SHA256:$(head -c 9 /dev/urandom | base64)" > "$file.pub"
"""


@dataclass(slots=True)
class Sleeper:
    """A guest that is woken again and again."""

    guest: AgentGuest
    generation: int = field(default=0)
    machine_id: str = field(default="5e" * 16)

    async def sh(self, script: str) -> str:
        done = await run(self.guest, "sh", "-c", script)
        assert done.end.status == 0, done
        return done.stdout.decode().strip()

    async def hook(self, name: str, script: str, *, mode: str = "755") -> None:
        path = f"{HOOKS}/{name}"
        await self.sh(
            f"mkdir -p {HOOKS}; printf '#!/bin/sh\\n%s\\n' {shlex.quote(script)} > {path}; chmod {mode} {path}"
        )

    async def wake(self, limit_secs: float = LIMIT_SECS) -> dict[str, ReceiptItem]:
        self.generation += 1
        identity = Identity(
            hostname="web", machine_id=self.machine_id, unix_ns=time.time_ns(), entropy=os.urandom(64),
            generation=self.generation, lease=NetLease(kind="none"), reason=WakeReason.CLONE,
            hook_timeout_secs=limit_secs,
        )  # fmt: skip
        return {item.name: item for item in (await self.guest.wake(identity)).items}

    async def forget(self) -> None:
        await self.sh(f"rm -rf {HOOKS}")


@pytest.fixture
async def sleeper(rig: VmmRig) -> AsyncIterator[Sleeper]:
    running = await rig.launch()
    async with rig.guest(running) as guest:
        assert isinstance(guest, AgentGuest)
        yield Sleeper(guest)


@pytest.mark.deadline(300)
async def test_hooks_run_in_order_of_their_names_and_none_of_them_can_hold_up_a_wake(sleeper: Sleeper) -> None:
    await sleeper.sh(f"printf '#!/bin/sh\\n' > {TRUE}; chmod 755 {TRUE}")
    assert not [name for name in await sleeper.wake() if name.startswith("hook")]

    await sleeper.hook("20-second", 'echo "$NOID_REASON $NOID_VM $NOID_GENERATION $(cat /run/noid/generation)"')
    await sleeper.hook("10-first", "date +%s%N > /run/first; printf '\\033[31mred\\n'; exit 3")
    await sleeper.hook(".hidden", "echo nobody sees me > /run/hidden")
    await sleeper.hook("30-forgotten", "true", mode="644")
    await sleeper.sh(f"ln -s 40-loop {HOOKS}/40-loop; mkdir {HOOKS}/50-directory; ln -s {TRUE} {HOOKS}/60-link")
    items = await sleeper.wake()
    assert [name for name in items if name.startswith("hook")] == [
        "hook:10-first", "hook:20-second", "hook:30-forgotten", "hook:40-loop", "hook:50-directory", "hook:60-link",
    ]  # fmt: skip
    found = {name: (item.status, item.after, item.detail) for name, item in items.items()}
    assert found["hook:10-first"] == ("failed", "exit 3", " [31mred")
    assert found["hook:20-second"] == ("done", "exit 0", "clone web 2 2")
    assert found["hook:30-forgotten"] == ("failed", "not run", "not an executable file")
    assert found["hook:40-loop"][:2] == ("failed", "not run")
    assert "oo many" in found["hook:40-loop"][2] or "loop" in found["hook:40-loop"][2]
    assert found["hook:50-directory"][:2] == ("failed", "not run")
    assert found["hook:60-link"] == ("done", "exit 0", "")
    assert await sleeper.sh("ls /run/hidden 2>/dev/null || echo none") == "none"
    await sleeper.forget()

    await sleeper.hook("10-hangs", "echo working on it; setsid sleep 1000 & sleep 1000")
    await sleeper.hook("20-late", "true")
    async with trio.open_nursery() as nursery:
        answered = trio.Event()
        nursery.start_soon(ping, sleeper, answered)
        items = await sleeper.wake(LIMIT_SECS)
        assert answered.is_set()
    assert items["hook:10-hangs"].status == "failed"
    assert items["hook:10-hangs"].after.startswith("killed after ")
    assert items["hook:10-hangs"].detail == "working on it"
    assert items["hook:20-late"].detail == "the time for all hooks was over"
    await until_nothing_is_left(sleeper)
    await sleeper.forget()

    await sleeper.hook("10-talks", "head -c 1000000000 /dev/zero | tr '\\0' x; echo the end")
    items = await sleeper.wake(1.0)
    assert items["hook:10-talks"].status == "failed"
    assert set(items["hook:10-talks"].detail) <= {"x"}
    await until_nothing_is_left(sleeper)
    await sleeper.forget()

    await sleeper.hook("10-bomb", "bomb() { bomb | bomb & }; bomb; sleep 1000")
    await sleeper.hook("20-bomb-and-away", "bomb() { bomb | bomb & }; bomb")
    items = await sleeper.wake(1.0)
    assert items["hook:10-bomb"].after.startswith("killed after ")
    await until_nothing_is_left(sleeper)
    await sleeper.sh(f"rm {HOOKS}/10-bomb")
    items = await sleeper.wake()
    assert items["hook:20-bomb-and-away"].after == "exit 0"
    await until_nothing_is_left(sleeper)
    await sleeper.forget()

    for number in range(40):
        await sleeper.sh(f"mkdir -p {HOOKS}; ln -s {TRUE} {HOOKS}/{number + 10}")
    items = await sleeper.wake()
    assert [name for name in items if name.startswith("hook:")] == [f"hook:{number + 10}" for number in range(12)]
    assert items["hooks"].status == "failed"
    await sleeper.forget()
    assert await sleeper.sh("ls -d /sys/fs/cgroup/noid-hook-* 2>/dev/null || echo none") == "none"


@pytest.mark.deadline(100)
async def test_host_keys_are_new_when_the_guest_is_another_machine_and_else_as_they_were(sleeper: Sleeper) -> None:
    await sleeper.sh(f"printf '%s' {shlex.quote(KEYGEN)} > /usr/bin/ssh-keygen; chmod 755 /usr/bin/ssh-keygen")
    await sleeper.sh("mkdir -p /etc/noid /etc/ssh; echo ed25519 > /etc/noid/ssh-host-keys")
    await sleeper.sh("cd /etc/ssh; echo old > ssh_host_rsa_key; echo SHA256:old > ssh_host_rsa_key.pub")
    first = (await sleeper.wake())["ssh-host-keys"]
    key = await sleeper.sh("cat /etc/ssh/ssh_host_ed25519_key.pub")
    assert (first.status, first.before, first.after, first.detail) == ("done", "SHA256:old", key, "")
    assert await sleeper.sh("cd /etc/ssh; echo $(ls -A)") == "ssh_host_ed25519_key ssh_host_ed25519_key.pub"

    assert "ssh-host-keys" not in await sleeper.wake()  # a boot, or a restore in place
    assert await sleeper.sh("cat /etc/ssh/ssh_host_ed25519_key.pub") == key

    sleeper.machine_id = "5f" * 16
    clone = (await sleeper.wake())["ssh-host-keys"]
    assert (clone.status, clone.before) == ("done", key)
    assert clone.after == await sleeper.sh("cat /etc/ssh/ssh_host_ed25519_key.pub") != key

    sleeper.machine_id = "60" * 16
    await sleeper.sh("printf '#!/bin/sh\\nexit 1\\n' > /usr/bin/ssh-keygen")
    failed = (await sleeper.wake())["ssh-host-keys"]
    assert (failed.status, failed.after) == ("failed", "exit 1")
    assert await sleeper.sh("cat /etc/ssh/ssh_host_ed25519_key.pub") == clone.after  # sshd is not left without


async def ping(sleeper: Sleeper, answered: trio.Event) -> None:
    await trio.sleep(0.1)  # until the wake is under way; a ping before it would be answered all the same
    await sleeper.guest.ping()
    answered.set()


async def until_nothing_is_left(sleeper: Sleeper) -> None:
    """Wait until hooks' cgroups are empty: what was killed may take a moment to be gone."""
    await sleeper.sh('while [ -n "$(cat /sys/fs/cgroup/noid-hook-*/cgroup.procs 2>/dev/null)" ]; do sleep 0.05; done')
