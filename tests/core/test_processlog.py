"""The log of a process on the host: numbered, bounded, whole after a crash, and going on when the disk does not."""

from __future__ import annotations

import random
from pathlib import Path

from noid.core.guests.processlog import MEMORY_BYTES, SEGMENT_BYTES, SEGMENTS_MAX, ProcessLog
from noid.core.model.guest_processes import OutputChunk
from noid.core.model.processes import Gap

NAME = "8f0a12bc"
CHUNK_BYTES = 60_000
BYTES = random.Random(1).randbytes(8 * SEGMENT_BYTES)  # noqa: S311  # that places can be told apart is enough


async def written(log: ProcessLog, end: int, *, chunk_bytes: int = CHUNK_BYTES) -> ProcessLog:
    """Append the next of `BYTES`, to byte *end*, by turns to stdout and stderr, and save whenever it is time."""
    while log.end < end:
        stream = 1 + log.end // chunk_bytes % 2
        data = BYTES[log.end : min(log.end + chunk_bytes, end)]
        if log.append(OutputChunk(stream=stream, data=data, offset=log.end)):
            await log.save()
    return log


async def everything(log: ProcessLog, offset: int) -> tuple[bytes, list[Gap]]:
    """Return what there is from *offset* on, having seen that every event begins where the one before ended."""
    data, gaps = bytearray(), []
    while events := await log.read(offset):
        for event in events:
            if isinstance(event, Gap):
                assert event.start == offset < event.end
                gaps.append(event)
            else:
                assert event.offset == offset
                assert event.data == BYTES[offset : event.end]
                data += event.data
            offset = event.end
    assert offset == log.end
    return bytes(data), gaps


def on_disk(directory: Path) -> list[Path]:
    return sorted(directory.glob(f"{NAME}.*"))


async def test_what_is_small_costs_no_file(tmp_path: Path) -> None:
    log = await written(ProcessLog(tmp_path / "processes", NAME), MEMORY_BYTES // 2)
    assert not (tmp_path / "processes").exists()
    assert await everything(log, 7) == (BYTES[7 : log.end], [])


async def test_every_byte_is_read_from_wherever_it_is_across_segments_and_memory(tmp_path: Path) -> None:
    log = await written(ProcessLog(tmp_path, NAME), 2 * SEGMENT_BYTES + 300_000)
    assert len(on_disk(tmp_path)) == 3
    assert log.start == 0
    boundary = SEGMENT_BYTES // CHUNK_BYTES * CHUNK_BYTES
    for offset in (0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, boundary, boundary + CHUNK_BYTES, log.end - 1, log.end):
        assert await everything(log, offset) == (BYTES[offset : log.end], [])
    [first, *_] = await log.read(5, 10)
    assert first == OutputChunk(stream=1, data=BYTES[5:CHUNK_BYTES], offset=5)


async def test_a_chunk_of_any_size_is_read_again_from_disk(tmp_path: Path) -> None:
    log = await written(ProcessLog(tmp_path, NAME), 900_000, chunk_bytes=300_000)
    log = await written(log, 1_200_000)  # so that memory holds only what came later
    for offset in (0, 250_000, 299_999, 300_001):
        assert await everything(log, offset) == (BYTES[offset : log.end], [])


async def test_the_oldest_goes_and_disk_and_memory_stay_bounded(tmp_path: Path) -> None:
    log = ProcessLog(tmp_path, NAME)
    for end in range(SEGMENT_BYTES // 2, 7 * SEGMENT_BYTES, SEGMENT_BYTES // 2):
        await written(log, end)
        sizes = [path.stat().st_size for path in on_disk(tmp_path)]
        assert len(sizes) <= SEGMENTS_MAX
        assert max(sizes) <= SEGMENT_BYTES + 2 * CHUNK_BYTES
        assert log.unsaved_bytes <= MEMORY_BYTES
        assert log.end - log.start >= min(end, 2 * SEGMENT_BYTES)
    assert log.start > 0
    data, gaps = await everything(log, 10)
    assert gaps == [Gap(start=10, end=log.start)]
    assert data == BYTES[log.start : log.end]


async def test_a_gap_is_recorded_and_what_is_known_already_is_not_there_twice(tmp_path: Path) -> None:
    log = ProcessLog(tmp_path, NAME)
    log.append(OutputChunk(stream=1, data=BYTES[:100], offset=0))
    log.append(OutputChunk(stream=1, data=BYTES[50:150], offset=50))
    log.append(OutputChunk(stream=1, data=BYTES[20:60], offset=20))
    log.append(OutputChunk(stream=2, data=BYTES[400:500], offset=400))
    log.append(Gap(start=450, end=600))
    log.append(Gap(start=200, end=300))
    expected = (BYTES[:150] + BYTES[400:500], [Gap(start=150, end=400), Gap(start=500, end=600)])
    assert await everything(log, 0) == expected
    await log.save()
    again = ProcessLog.open(tmp_path, NAME)
    assert await everything(again, 0) == expected
    assert await everything(again, 550) == (b"", [Gap(start=550, end=600)])


async def test_what_a_crash_cut_off_is_dropped_wherever_it_cut(tmp_path: Path) -> None:
    log = ProcessLog(tmp_path, NAME)
    for offset, stream in ((0, 1), (100, 2)):
        log.append(OutputChunk(stream=stream, data=BYTES[offset : offset + 100], offset=offset))
        await log.save()
    [segment] = on_disk(tmp_path)
    whole = segment.read_bytes()
    first = len(whole) // 2
    for size in range(len(whole)):
        segment.write_bytes(whole[:size])
        opened = ProcessLog.open(tmp_path, NAME)
        assert opened.end == (100 if size >= first else 0)
        assert segment.stat().st_size == (first if size >= first else 0)
        await written(opened, 300, chunk_bytes=100)  # the guest still has what is missing
        await opened.save()
        assert await everything(ProcessLog.open(tmp_path, NAME), 0) == (BYTES[:300], [])


async def test_what_is_no_record_at_the_end_of_a_segment_is_dropped(tmp_path: Path) -> None:
    log = await written(ProcessLog(tmp_path, NAME), 100)
    await log.save()
    [segment] = on_disk(tmp_path)
    whole = segment.read_bytes()
    segment.write_bytes(whole + b"\xff" * 4096)
    assert await everything(ProcessLog.open(tmp_path, NAME), 0) == (BYTES[:100], [])
    assert segment.read_bytes() == whole


async def test_a_segment_that_is_lost_is_a_gap_also_for_a_later_agent(tmp_path: Path) -> None:
    log = await written(ProcessLog(tmp_path, NAME), 2 * SEGMENT_BYTES + 500_000)
    await log.save()
    first, second, third = on_disk(tmp_path)
    begin, end = first.stat().st_size, third.stat().st_size
    second.unlink()
    for reader in (log, ProcessLog.open(tmp_path, NAME)):
        data, [gap] = await everything(reader, 0)
        assert data == BYTES[: gap.start] + BYTES[gap.end : log.end]
        assert gap.start <= begin
        assert log.end - gap.end <= end


async def test_a_full_disk_leaves_the_latest_in_memory_and_the_rest_is_a_gap(tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.00000000").symlink_to("/dev/full")
    log = ProcessLog(tmp_path, NAME)
    await written(log, 3 * MEMORY_BYTES)
    await log.save()
    assert log.unsaved_bytes == 0  # nobody is held up by what cannot be saved
    assert MEMORY_BYTES // 2 <= log.end - log.start <= MEMORY_BYTES
    data, gaps = await everything(log, 0)
    assert gaps == [Gap(start=0, end=log.start)]
    assert data == BYTES[log.start : log.end]


async def test_a_disk_that_is_full_later_takes_nothing_from_what_is_read_on(tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.00000001").symlink_to("/dev/full")
    log = await written(ProcessLog(tmp_path, NAME), SEGMENT_BYTES - 200_000)
    offset = log.end - 1000
    await written(log, SEGMENT_BYTES + MEMORY_BYTES)
    data, gaps = await everything(log, offset)
    assert sum(gap.end - gap.start for gap in gaps) + len(data) == log.end - offset
    assert data.endswith(BYTES[log.end - MEMORY_BYTES // 2 : log.end])
    await written(log, 3 * SEGMENT_BYTES)
    await log.save()
    assert log.end - log.start <= MEMORY_BYTES


async def test_a_removed_log_leaves_no_file_and_makes_none(tmp_path: Path) -> None:
    log = await written(ProcessLog(tmp_path, NAME), SEGMENT_BYTES)
    await log.describe({"pid": 7})
    await log.remove()
    await log.describe({"pid": 7})
    await written(log, 2 * SEGMENT_BYTES)
    await log.save()
    assert on_disk(tmp_path) == []
