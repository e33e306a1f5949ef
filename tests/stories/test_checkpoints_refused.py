"""A checkpoint that was changed, or taken by something else, is refused with what differs; nothing else is touched."""

from __future__ import annotations

import json
from typing import Any

import pytest

House = Any  # see conftest.py
pytestmark = pytest.mark.vm


@pytest.fixture
def checkpoint(house: House) -> str:
    """A checkpoint of a VM 'web' that runs."""
    house.create("web")
    return str(house.checkpoint("web"))


def refused(house: House, checkpoint: str) -> str:
    """Try to restore both ways; return why not. The VM must not notice."""
    in_place = house("restore", "web", checkpoint).complaint
    assert house("restore", "web", checkpoint, "--as", "copy").complaint == in_place
    assert house.states() == {"web": "running"}
    assert house.guest("web", "hostname") == "web"
    assert house.strays() == []
    return str(in_place)


def test_a_flipped_bit_a_short_layer_and_an_edited_manifest_are_noticed(house: House, checkpoint: str) -> None:
    place = house.checkpoint_directory(checkpoint)
    web = house.directory("web")

    manifest = place / "manifest.json"
    genuine = manifest.read_text()
    document = json.loads(genuine)
    document["manifest"]["cpus"] = 2
    manifest.write_text(json.dumps(document))
    said = refused(house, checkpoint)
    assert said.startswith(
        f"server error (500): manifest.json of checkpoint {checkpoint} was changed after it was written. "
    )
    manifest.write_text("{")
    assert f"manifest.json of checkpoint {checkpoint} cannot be read" in refused(house, checkpoint)
    manifest.write_text(genuine)

    memory = place / "memory"
    assert not (web / "memory").samefile(memory)
    with memory.open("r+b") as file:
        file.seek(20 << 20)
        byte = file.read(1)[0]
        file.seek(20 << 20)
        file.write(bytes((byte ^ 1,)))
    said = refused(house, checkpoint)
    assert said.startswith(f"server error (500): checkpoint {checkpoint} is damaged: memory: its content differs")
    with memory.open("r+b") as file:
        file.seek(20 << 20)
        file.write(bytes((byte,)))
    house.ok("restore", "web", checkpoint, "--as", "copy")  # the seal is broken, and the digest is right again
    house.ok("destroy", "copy")

    top = place / "disk" / json.loads(genuine)["manifest"]["disk_top"]
    size = top.stat().st_size
    copy = top.with_name("copy")
    copy.write_bytes(top.read_bytes()[: size - 1])
    copy.replace(top)  # the layer itself may be shared with the running VM
    said = refused(house, checkpoint)
    assert f"disk/{top.name}: it has {size - 1} bytes instead of {size}" in said


@pytest.mark.usefixtures("qemu")
def test_a_checkpoint_of_another_machine_type_is_refused_with_the_field_that_differs(
    house: House, checkpoint: str
) -> None:
    house.settings('[pool]\nsize = 0\n[plugins.vmm_qemu]\nmachine = "q35"\n')
    house.end_agent()
    said = refused(house, checkpoint)
    assert said.startswith(f"server error (409): checkpoint {checkpoint} cannot continue here: machine was 'microvm'")
    assert "'q35' on this host" in said
