"""What a VM's process is kept in, as the host sees it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from noid.core.model.sandbox import DEFAULT_UIDS
from noid.vmmhost.launcher import LAUNCHER

House = Any  # see conftest.py
pytestmark = [
    pytest.mark.vm,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not LAUNCHER.is_file(), reason=f"{LAUNCHER.name} is not built"),
]


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: " ".join(value.split()) for name, _, value in (line.partition(":") for line in lines)}


def test_each_vm_is_a_user_of_its_own_who_sees_its_own_files_and_can_do_nothing(noid: House) -> None:
    noid.create("web")
    noid.ok("fork", "web", "1")
    machines = noid.machines()
    users = set()
    for name in ("web", "web-1"):
        instance = noid.instance(name)
        pid = machines[instance]
        said = status(pid)
        uid = int(said["Uid"].split()[1])
        users.add(uid)
        assert uid in DEFAULT_UIDS
        assert said["Uid"] == " ".join([str(uid)] * 4)
        assert {said[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
        assert (said["NoNewPrivs"], said["Seccomp"]) == ("1", "2")
        root = Path(f"/proc/{pid}/root")
        assert not (root / "proc").exists()
        assert not (root / "etc/passwd").exists()
        seen = root / str(noid.layout.vms).lstrip("/")
        assert [entry.name for entry in seen.iterdir()] == [instance], "no other VM is there"
        assert not (root / str(noid.data_dir).lstrip("/") / "noid.db").exists()
        if (Path("/sys/fs/cgroup/pids")).exists() or (Path("/sys/fs/cgroup/cgroup.controllers")).exists():
            assert f"/{instance}\n" in Path(f"/proc/{pid}/cgroup").read_text()
    assert len(users) == 2
