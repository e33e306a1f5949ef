"""Manifests: what a checkpoint's directory says of itself, and how damage or a foreign host is noticed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from noid.core.checkpoints import manifest as manifests
from noid.core.checkpoints.manifest import Manifest, data_digest
from noid.core.model.storage import FrozenDisk
from noid.core.model.times import now
from noid.errors import Damaged, Incompatible, NotFound
from noid.hostfs import sparse_copy

HOST = {"vmm": "qemu", "version": "7.2", "accelerator": "tcg", "cpu": "max"}


def write_checkpoint(directory: Path, format: str = "raw") -> Manifest:
    """Write a checkpoint of small files into *directory* and return its manifest."""
    (directory / "disk").mkdir(parents=True)
    (directory / "state").write_bytes(b"state" * 100)
    (directory / "memory").write_bytes(b"memory" * 1000)
    name = "disk.raw" if format == "raw" else "top.qcow2"
    (directory / "disk" / name).write_bytes(b"disk" * 1000)
    files = (name,)
    if format == "qcow2":
        (directory / "disk" / "base.raw").write_bytes(b"base" * 1000)
        files = ("base.raw", name)
    disk = FrozenDisk(directory=directory / "disk", format=format, top=name, files=files)
    draft = Manifest(
        id="0123456789abcdef", vm_id="v", vm_name="web", label="before", parent=None, created_at=now(), cpus=2,
        mem_mib=256, image="default", image_digest="i", kernel_release="6.1", network="none", fingerprint=HOST,
    )  # fmt: skip
    manifest = manifests.with_files(draft, disk, manifests.describe_files(directory, disk, {}))
    manifests.write(directory, manifest)
    return manifest


def verify(directory: Path) -> None:
    manifests.verify(directory, manifests.read(directory), HOST, frozenset({"raw", "qcow2"}))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "0123456789abcdef"
    write_checkpoint(directory)
    return directory


@pytest.fixture
def layered(tmp_path: Path) -> Path:
    directory = tmp_path / "fedcba9876543210"
    write_checkpoint(directory, format="qcow2")
    return directory


def flip(path: Path, *, keep_mtime: bool = False) -> None:
    before = path.stat()
    with path.open("r+b") as file:
        first = file.read(1)[0]
        file.seek(0)
        file.write(bytes([first ^ 1]))
    if keep_mtime:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def edit(directory: Path, change: Callable[[dict[str, object]], object], *, reseal: bool = False) -> None:
    """Change the manifest; with *reseal* as a noid would that wrote it so."""
    document = json.loads((directory / "manifest.json").read_text())
    change(document["manifest"])
    if reseal:
        document["digest"] = manifests._json_digest(document["manifest"])
    (directory / "manifest.json").write_text(json.dumps(document))


# --- what is written ---------------------------------------------------------------------------------------------


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path / "c")
    assert manifests.read(tmp_path / "c") == written
    verify(tmp_path / "c")


def test_it_holds_no_path_of_this_host(checkpoint: Path) -> None:
    text = (checkpoint / "manifest.json").read_text() + (checkpoint / "seal.json").read_text()
    assert str(checkpoint.parent) not in text
    assert os.uname().nodename not in json.loads(text.partition("\n}\n")[0] + "}")["manifest"].values()


def test_a_layer_known_from_before_is_not_read_again(layered: Path) -> None:
    known = dict(manifests.read(layered).files)
    flip(layered / "disk" / "top.qcow2")
    disk = manifests.read(layered).disk(layered)
    assert manifests.describe_files(layered, disk, known)["disk/top.qcow2"] == known["disk/top.qcow2"]
    assert manifests.describe_files(layered, disk, {})["disk/top.qcow2"] != known["disk/top.qcow2"]


# --- another host ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", HOST)
def test_each_field_of_the_fingerprint_that_differs_is_named_with_both_values(checkpoint: Path, field: str) -> None:
    manifest = manifests.read(checkpoint)
    with pytest.raises(Incompatible, match=rf"{field} was '{HOST[field]}' when it was taken and is 'other'"):
        manifests.verify(checkpoint, manifest, HOST | {field: "other"}, frozenset({"raw"}))


def test_a_field_only_one_of_both_hosts_knows_differs_too(checkpoint: Path) -> None:
    manifest = manifests.read(checkpoint)
    with pytest.raises(Incompatible, match="microcode was None when it was taken and is '7'"):
        manifests.verify(checkpoint, manifest, HOST | {"microcode": "7"}, frozenset({"raw"}))
    with pytest.raises(Incompatible, match="cpu was 'max' when it was taken and is None"):
        manifests.verify(checkpoint, manifest, {k: v for k, v in HOST.items() if k != "cpu"}, frozenset({"raw"}))


def test_a_disk_format_the_storage_does_not_take_is_named(layered: Path) -> None:
    with pytest.raises(Incompatible, match="disk_format is 'qcow2' and the storage backend takes raw"):
        manifests.verify(layered, manifests.read(layered), HOST, frozenset({"raw"}))


# --- damage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["state", "memory", "disk/disk.raw"])
def test_a_flipped_byte_is_noticed_and_the_file_named(checkpoint: Path, name: str) -> None:
    flip(checkpoint / name)
    with pytest.raises(Damaged, match=f"is damaged: {name}: "):
        verify(checkpoint)


@pytest.mark.parametrize("name", ["state", "memory", "disk/disk.raw"])
def test_a_missing_or_shortened_file_is_noticed_and_named(checkpoint: Path, name: str) -> None:
    path = checkpoint / name
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(Damaged, match=f"{name}: it has .* bytes instead of"):
        verify(checkpoint)
    path.unlink()
    with pytest.raises(Damaged, match=f"{name}: No such file"):
        verify(checkpoint)


def test_damage_below_the_filesystem_is_not_looked_for_in_a_file_with_its_seal_intact(checkpoint: Path) -> None:
    """What the seal promises and what not: it costs microseconds because it does not read."""
    for name in ("memory", "disk/disk.raw"):
        flip(checkpoint / name, keep_mtime=True)
    verify(checkpoint)


def test_a_touched_file_with_a_digest_passes_and_a_raw_disk_without_one_does_not(checkpoint: Path) -> None:
    os.utime(checkpoint / "memory", ns=(1, 1))
    verify(checkpoint)
    os.utime(checkpoint / "disk" / "disk.raw", ns=(1, 1))
    with pytest.raises(Damaged, match="written to, moved or replaced, and has no digest"):
        verify(checkpoint)


def test_a_copied_directory_is_verified_by_its_digests(layered: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(layered, copy)
    verify(copy)
    flip(copy / "disk" / "top.qcow2", keep_mtime=True)  # its inode is another, so this is read
    with pytest.raises(Damaged, match=r"disk/top\.qcow2: its content differs from its digest"):
        verify(copy)


def test_a_directory_that_was_renamed_needs_no_reading(checkpoint: Path, tmp_path: Path) -> None:
    moved = checkpoint.rename(tmp_path / "elsewhere")
    verify(moved)


@pytest.mark.parametrize("seal", ["", "[]", "null", "{", '{"memory": 5}'])
def test_without_a_seal_the_digests_decide(layered: Path, seal: str) -> None:
    (layered / "seal.json").write_text(seal)
    verify(layered)
    flip(layered / "memory", keep_mtime=True)
    with pytest.raises(Damaged, match="memory: its content differs"):
        verify(layered)


# --- the manifest itself -------------------------------------------------------------------------------------------


def test_a_directory_without_a_manifest_is_no_checkpoint(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(NotFound, match="has no manifest"):
        manifests.read(checkpoint)


def test_an_edited_manifest_is_refused(checkpoint: Path) -> None:
    edit(checkpoint, lambda body: body.update(cpus=32))
    with pytest.raises(Damaged, match="was changed after it was written"):
        manifests.read(checkpoint)


def test_a_format_of_the_future_is_refused_and_says_upgrade(checkpoint: Path) -> None:
    edit(checkpoint, lambda body: body.update(format=2), reseal=True)
    with pytest.raises(Damaged, match=r"another noid version\. Upgrade noid"):
        manifests.read(checkpoint)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"manifest": "x", "digest": "x"}', '{"manifest": {}}', "\xff"]
)
def test_what_is_no_manifest_is_damage(checkpoint: Path, text: str) -> None:
    (checkpoint / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(Damaged, match=r"manifest\.json of checkpoint 0123456789abcdef"):
        manifests.read(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["files"].pop("memory"),
        lambda body: body["files"].update({"../../noid.db": {"size": 1, "digest": None}}),
        lambda body: body.update(disk_top="other"),
        lambda body: body.update(disk_files=["../../../noid.db"]),
        lambda body: body.update(surprise=1),
        lambda body: body.pop("cpus"),
        lambda body: body.update(created_at="yesterday"),
    ],
)
def test_a_manifest_that_lacks_a_file_or_names_one_elsewhere_is_refused(
    checkpoint: Path, change: Callable[[dict[str, object]], object]
) -> None:
    """Checkpoints travel, so a manifest may come from anywhere, digest and all."""
    edit(checkpoint, change, reseal=True)
    with pytest.raises(Damaged, match="cannot be read"):
        manifests.read(checkpoint)


# --- digests -------------------------------------------------------------------------------------------------------


def test_the_digest_of_a_sparse_and_a_dense_copy_is_the_same(tmp_path: Path) -> None:
    sparse, dense, recopied = tmp_path / "sparse", tmp_path / "dense", tmp_path / "recopied"
    with sparse.open("wb") as file:
        file.truncate(10 << 20)
        for offset, data in ((5000, b"x" * 10000), (3 << 20, b"y"), ((10 << 20) - 1, b"z")):
            file.seek(offset)
            file.write(data)
    dense.write_bytes(sparse.read_bytes())
    sparse_copy(dense, recopied)
    assert dense.stat().st_blocks > sparse.stat().st_blocks
    assert data_digest(sparse) == data_digest(dense) == data_digest(recopied)


def test_the_digest_tells_length_place_and_content_apart(tmp_path: Path) -> None:
    digests = set()
    for number, (length, offset, data) in enumerate(
        [
            (1 << 20, 0, b""),
            (2 << 20, 0, b""),
            (2 << 20, 0, b"x"),
            (2 << 20, 1 << 20, b"x"),
            (2 << 20, 0, b"y"),
            (0, 0, b""),
        ]
    ):
        path = tmp_path / str(number)
        with path.open("wb") as file:
            file.truncate(length)
            file.seek(offset)
            file.write(data)
        digests.add(data_digest(path))
    assert len(digests) == 6
