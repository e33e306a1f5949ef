"""What can be asked for, at its edges: each refusal is one paragraph that says what to do, and harms nothing."""

from __future__ import annotations

from typing import Any

import pytest

from noid.core.agent import host_mem_mib

House = StoryVmm = Any  # see conftest.py
NOBODY = "server error (404): VM 'nobody' not found. See which there are with: noid list"
pytestmark = pytest.mark.vm


def test_every_character_and_all_64_of_them_make_a_name(noid: House) -> None:
    for name in ("A-z_0.9", "_", "0", "x" * 64, "a.b-c_d." + "9" * 56):
        noid.create(name)
        assert noid.guest(name, "echo $((6*7))") == "42"
        checkpoint = noid.checkpoint(name)
        noid.ok("restore", name, checkpoint)
        assert noid.guest(name, "cat /proc/sys/kernel/hostname") != ""
        assert noid.states()[name] == "running"
        noid.ok("destroy", name)


def test_what_is_no_name_is_refused_here_and_by_the_agent(noid: House) -> None:
    for name in ("", "x" * 65, ".hidden", "a..b", "a b", "a/b", "ü", "a\nb", "a%41"):
        said = noid("create", name, "--mem", "96").complaint
        assert "VM name" in said
        status, answer = noid.http("POST", "/v1/vms", {"name": name, "cpus": 1, "mem_mib": 96, "image": "tiny"})
        assert (status, answer["code"]) == (400, "invalid"), answer
    assert noid("create", "--", "-x").complaint.startswith("VM name '-x' begins with '-'")
    assert noid.states() == {}


@pytest.mark.parametrize("cpus", [0, 33, -1])
def test_so_many_processors_cannot_be(noid: House, cpus: int) -> None:
    said = noid("create", "x", "--cpus", str(cpus), "--mem", "96", "--image", "tiny").complaint
    assert said == f"server error (400): cpus is {cpus}; it must be between 1 and 32."


def test_so_much_memory_cannot_be(noid: House) -> None:
    for mem_mib in (0, 1, -5, 63, host_mem_mib() + 1, 10**15):
        said = noid("create", "x", "--mem", str(mem_mib), "--image", "tiny").complaint
        assert said == (
            f"server error (400): mem_mib is {mem_mib}; it must be between 64 and {host_mem_mib()}, the host's memory."
        )


def test_a_number_that_is_none_is_wrong_usage_here_and_invalid_there(noid: House) -> None:
    for option in ("--cpus", "--mem"):
        done = noid("create", "x", option, "two")
        assert done.code == 2
        assert b"'two' is not a valid integer" in done.err
    for field, value in (("cpus", "two"), ("mem_mib", 96.5), ("cpus", True), ("mem_mib", None), ("name", 7)):
        status, answer = noid.http(
            "POST", "/v1/vms", {"name": "x", "cpus": 1, "mem_mib": 96, "image": "tiny"} | {field: value}
        )
        assert (status, answer["code"]) == (400, "invalid"), answer
        assert field in answer["error"]
    assert noid.states() == {}


def test_what_there_is_not_is_404_and_says_what_to_do(noid: House) -> None:
    noid.create("web")
    for words in (["info"], ["destroy"], ["checkpoint"], ["checkpoints"]):
        assert noid(*words, "nobody").complaint == NOBODY
    assert noid("exec", "nobody", "--", "true").complaint == NOBODY
    said = noid("restore", "web", "0123456789abcdef").complaint
    assert said.startswith("server error (404): checkpoint"), said
    for checkpoint in ("nonsense", "../../etc"):  # a label, or the beginning of an id
        said = noid("restore", "web", checkpoint).complaint
        assert said.startswith(f"checkpoint '{checkpoint}' not found: VM 'web' has none with that id"), said
    said = noid("create", "x", "--mem", "96", "--image", "nope").complaint
    assert said.startswith("server error (404): there is no image 'nope' (there is: tiny). Make one with")
    assert noid.states() == {"web": "running"}
    assert noid.strays() == []


def test_a_kernel_that_cannot_start_in_so_little_memory_says_so(house: House, vmm: StoryVmm) -> None:
    said = house("create", "x", "--mem", "64", "--image", "tiny").complaint
    assert ("Kernel panic - not syncing" if vmm.name == "qemu" else "invalid memory configuration") in said
    assert said.endswith("give the VM more memory.")
    assert house.states() == {}
    assert house.strays() == []
