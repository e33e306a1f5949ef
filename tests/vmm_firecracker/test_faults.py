"""What goes wrong at calls, seen from outside the plugin; through the whole agent: `test_fault_sweep`."""

from __future__ import annotations

import os
from pathlib import Path

import noid_vmm_firecracker.api
import noid_vmm_firecracker.backend
import noid_vmm_firecracker.memory
import pytest
import trio
import trio.testing
from noid_vmm_firecracker.backend import FirecrackerBackend
from noid_vmm_firecracker.probe import Found

from noid.errors import BackendError, DependencyDown, NoidError, NoSpace
from noid.testing.firecracker import SimulatedFirecracker
from noid.testing.vmm_rig import Running, VmmRig

BOUND_SECS = 20.0


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for an answer that never comes. The real deadlines are of seconds."""
    monkeypatch.setattr(noid_vmm_firecracker.api, "DEADLINE_SECS", 1.5)
    monkeypatch.setattr(noid_vmm_firecracker.api, "SNAPSHOT_SECS", 1.5)
    monkeypatch.setattr(noid_vmm_firecracker.backend, "START_SECS", 1.5)


@pytest.mark.parametrize("what", ["die", "hang"])
async def test_a_process_that_never_listens_is_not_waited_for(
    rig: VmmRig, firecracker: SimulatedFirecracker, what: str
) -> None:
    firecracker.arm("start", what)

    with trio.fail_after(BOUND_SECS), pytest.raises(BackendError, match="listen"):
        await rig.launch()

    assert rig.processes() == {}


@pytest.mark.parametrize("call", ["PATCH /vm", "PUT /snapshot/create"])
@pytest.mark.parametrize(("what", "when"), [("refuse", "before"), ("cut", "before"), ("cut", "after")])
async def test_a_checkpoint_that_fails_leaves_its_source_as_it_was_and_the_next_one_succeeds(
    rig: VmmRig, firecracker: SimulatedFirecracker, call: str, what: str, when: str
) -> None:
    source = await rig.fresh()
    await rig.write(source, "/dev/shm/kept", "all of it")
    firecracker.arm(call, what, when=when)
    (into := rig.data_dir / "failed").mkdir()

    async def attempt() -> None:
        await source.machine.pause()
        await source.machine.capture(into)

    with trio.fail_after(BOUND_SECS), pytest.raises(NoidError, match=call):
        await attempt()

    await source.machine.resume()
    assert firecracker.struck()
    assert not (into / "memory").exists()
    assert await rig.read(source, "/dev/shm/kept") == "all of it"
    clone = await rig.clone(await rig.checkpoint(source))
    assert await rig.read(clone, "/dev/shm/kept") == "all of it"


async def test_a_capture_whose_process_dies_in_its_middle_says_so_and_the_machine_has_ended(
    rig: VmmRig, firecracker: SimulatedFirecracker
) -> None:
    source = await rig.launch()
    firecracker.arm("PUT /snapshot/create", "die", when="during")
    (into := rig.data_dir / "failed").mkdir()
    await source.machine.pause()

    with trio.fail_after(BOUND_SECS), pytest.raises(DependencyDown, match="PUT /snapshot/create"):
        await source.machine.capture(into)

    with trio.fail_after(BOUND_SECS):
        assert (await source.machine.wait()).reason == "killed"


async def test_a_capture_that_hangs_ends_and_so_does_the_attempt_to_go_on(
    rig: VmmRig, firecracker: SimulatedFirecracker
) -> None:
    source = await rig.launch()
    firecracker.arm("PUT /snapshot/create", "hang")
    await source.machine.pause()

    with trio.fail_after(BOUND_SECS):
        with pytest.raises(DependencyDown, match=r"did not answer PUT /snapshot/create within 1\.5 s"):
            await source.machine.capture(rig.data_dir)
        with pytest.raises(DependencyDown, match="PATCH /vm"):
            await source.machine.resume()
        await source.machine.kill()

    assert rig.processes() == {}


async def test_a_guest_that_did_not_go_on_after_its_pause_goes_on_as_soon_as_it_can(
    rig: VmmRig, firecracker: SimulatedFirecracker
) -> None:
    source = await rig.launch()
    firecracker.arm("PATCH /vm", "refuse", nth=2)
    await source.machine.pause()
    with pytest.raises(BackendError, match="PATCH /vm"):
        await source.machine.resume()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.machine.wait)
        with trio.fail_after(BOUND_SECS):
            assert (await rig.run(source, "true")).status == 0
        nursery.cancel_scope.cancel()


async def test_a_snapshot_that_was_given_up_writes_into_no_other_file_of_the_agent(
    rig: VmmRig, firecracker: SimulatedFirecracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await rig.fresh()
    firecracker.arm("PUT /snapshot/create", "late", when="during", secs=0.6)  # it has not opened the memory file yet
    await source.machine.pause()
    monkeypatch.setattr(noid_vmm_firecracker.api, "SNAPSHOT_SECS", 0.2)
    with pytest.raises(DependencyDown, match="did not answer PUT /snapshot/create"):
        await source.machine.capture(rig.data_dir)

    files = [(rig.data_dir / f"precious{number}").open("wb") for number in range(20)]
    await source.machine.resume()
    sizes = {os.fstat(file.fileno()).st_size for file in files}
    for file in files:
        file.close()

    assert sizes == {0}
    monkeypatch.undo()
    await rig.write(source, "/dev/shm/word", "whole")
    assert await rig.read(await rig.clone(await rig.checkpoint(source)), "/dev/shm/word") == "whole"


async def test_a_machine_whose_agent_died_in_a_long_snapshot_is_waited_for_by_the_next_one(
    rig: VmmRig, firecracker: SimulatedFirecracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await rig.fresh()
    firecracker.arm("PUT /snapshot/create", "late", when="during", secs=1.5)
    monkeypatch.setattr(noid_vmm_firecracker.backend, "ADOPT_SECS", 0.5)
    await source.machine.pause()
    with trio.move_on_after(0.3):
        await source.machine.capture(rig.data_dir)

    machine = await rig.vmm.adopt(source.machine.ref, source.plan, source.memory)  # the first agent is no more
    try:
        await machine.resume()
        assert (await rig.run(Running(machine=machine, plan=source.plan), "true")).status == 0
    finally:
        await machine.aclose()


async def test_whoever_knocks_at_the_guest_during_a_capture_is_heard_after_it(
    rig: VmmRig,
) -> None:
    source = await rig.fresh()
    await source.machine.pause()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.run, source, "true")
        await trio.testing.wait_all_tasks_blocked(0.1)
        capture = await source.machine.capture(rig.data_dir)
        await source.machine.resume()
        nursery.cancel_scope.deadline = trio.current_time() + BOUND_SECS
    capture.discard()

    assert not nursery.cancel_scope.cancelled_caught


async def test_firecrackers_word_for_a_full_disk_is_no_space(rig: VmmRig, firecracker: SimulatedFirecracker) -> None:
    source = await rig.launch()
    words = "Create snapshot error: Cannot write memory file: No space left on device (os error 28)"
    firecracker.arm("PUT /snapshot/create", "refuse", text=words)
    await source.machine.pause()

    with pytest.raises(NoSpace, match="os error 28"):
        await source.machine.capture(rig.data_dir)


async def test_an_answer_that_comes_late_is_waited_for(rig: VmmRig, firecracker: SimulatedFirecracker) -> None:
    firecracker.arm("PUT /actions", "late", when="after", secs=0.5)

    assert (await rig.run(await rig.launch(), "true")).status == 0


async def test_what_a_discarded_capture_has_taken_is_in_the_next_one(rig: VmmRig) -> None:
    source = await rig.fresh()
    for number in range(6):  # more often than layers are kept
        await rig.write(source, f"/dev/shm/{number}", f"{number}")
        await source.machine.pause()
        (await source.machine.capture(rig.data_dir)).discard()
        await source.machine.resume()

    clone = await rig.clone(await rig.checkpoint(source))

    assert await rig.read(clone, *(f"/dev/shm/{number}" for number in range(6))) == "012345"


async def test_captures_may_be_finished_late_and_in_any_order(rig: VmmRig) -> None:
    source = await rig.fresh()
    captures = []
    for number in range(3):
        await rig.write(source, f"/dev/shm/{number}", f"{number}")
        (into := rig.data_dir / f"late{number}").mkdir()
        await source.machine.pause()
        captures.append(await source.machine.capture(into))
        await source.machine.resume()
    for capture in (captures[1], captures[0], captures[2]):
        await capture.finish()

    clone = await rig.clone(await rig.checkpoint(source))

    assert await rig.read(clone, "/dev/shm/0", "/dev/shm/1", "/dev/shm/2") == "012"
    for older, newer in (("late0", "late1"), ("late1", "late2")):
        assert (rig.data_dir / older / "memory").read_bytes() != (rig.data_dir / newer / "memory").read_bytes()


@pytest.mark.parametrize("finished", [True, False], ids=["after a finished capture", "in the middle of one"])
async def test_the_next_agent_knows_what_it_may_build_on(
    rig: VmmRig, firecracker: SimulatedFirecracker, finished: bool
) -> None:
    source = await rig.fresh()
    await rig.write(source, "/dev/shm/before", "before ")
    await source.machine.pause()
    capture = await source.machine.capture(rig.data_dir)
    await source.machine.resume()
    if finished:
        await capture.finish()
        (rig.data_dir / "memory").unlink()  # its checkpoint may be deleted meanwhile
    await rig.write(source, "/dev/shm/after", "after")

    adopted = await rig.adopt(source)  # of an agent that was killed, nothing but files is left
    clone = await rig.clone(await rig.checkpoint(adopted))

    assert await rig.read(clone, "/dev/shm/before", "/dev/shm/after") == "before after"
    capture.discard()
    assert (source.plan.directory / "memory.base").exists()


async def test_a_start_that_is_refused_says_in_firecrackers_words_why_and_what_to_try(
    rig: VmmRig, firecracker: SimulatedFirecracker
) -> None:
    words = "Cannot load kernel due to invalid memory configuration"
    firecracker.arm("PUT /actions", "refuse", text=words)

    with trio.fail_after(BOUND_SECS), pytest.raises(BackendError, match=words) as refused:
        await rig.launch()

    assert f"{words}. Check the image's kernel, or give the VM more memory." in str(refused.value)


async def test_a_snapshot_that_is_refused_when_a_standing_copy_is_let_go_is_told_and_leaves_nothing(
    rig: VmmRig, firecracker: SimulatedFirecracker
) -> None:
    source = await rig.launch()
    copy = await rig.clone(await rig.checkpoint(source), paused=True)
    firecracker.arm("PUT /snapshot/load", "refuse", text="the state is not to my liking")

    with trio.fail_after(BOUND_SECS), pytest.raises(BackendError, match="not to my liking") as refused:
        await copy.machine.resume()
    await copy.machine.kill()
    assert "not to my liking. If it goes on, this checkpoint is damaged: restore another one." in str(refused.value)

    assert set(rig.processes()) == {source.machine.ref.pid}
    assert (await rig.run(source, "true")).status == 0


async def test_a_snapshot_without_the_time_is_continued_without_and_no_other_is_asked_for_it(
    rig: VmmRig, firecracker: SimulatedFirecracker
) -> None:
    found = Found(path=str(firecracker.program), version=(1, 17, 0), kvm_refusal="")
    rig.vmm = FirecrackerBackend(found, clock_realtime=True)
    taken = await rig.checkpoint(await rig.launch())
    firecracker.arm("PUT /snapshot/load", "refuse", text="clock_realtime requested but not present in the snapshot")
    before = len(firecracker.calls())

    with trio.fail_after(BOUND_SECS):
        clones = [await rig.clone(taken), await rig.clone(taken)]

    assert firecracker.struck()
    assert firecracker.calls()[before:].count("PUT /snapshot/load") == 3
    assert set(rig.processes()) >= {clone.machine.ref.pid for clone in clones}
    assert len(rig.processes()) == 3


@pytest.mark.parametrize(
    ("tracked", "swap", "whole"), [(True, True, False), (False, False, False), (False, True, True)]
)
def test_what_was_swapped_out_is_in_a_snapshot_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracked: bool, swap: bool, whole: bool
) -> None:
    (image := tmp_path / "image").write_bytes(bytes(4096))
    (swaps := tmp_path / "swaps").write_text(
        "Filename Type Size Used Priority\n" + "/dev/vdb partition 1 0 -2\n" * swap
    )
    monkeypatch.setattr(noid_vmm_firecracker.memory, "_SWAPS", swaps)
    lineage = noid_vmm_firecracker.memory.Lineage(tmp_path, 4096, tracked=tracked)
    lineage.begin(image)

    layer = lineage.next_layer(tmp_path)

    assert layer.whole is whole
    layer.close()
    lineage.close(is_over=True)
