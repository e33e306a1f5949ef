"""Measures how fast this host's time stamp counter runs, which under emulation is how fast the guest's runs too.

``cpu MHz`` in ``/proc/cpuinfo`` is what the core happens to be clocked at; on a laptop that is another number. So the
counter is read, by nine bytes of machine code, at both ends of a stretch of the raw monotonic clock.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import mmap
import re
import time
from collections.abc import Callable
from pathlib import Path

# rdtsc; shl rdx, 32; or rax, rdx; ret
_RDTSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")
_PAIR_TRIES = 200
_STRETCHES = 4
_STRETCH_NS = 5_000_000

log = logging.getLogger(__name__)


@functools.cache
def tsc_khz() -> int:
    """Return the TSC's frequency in kHz. The first call takes 20 ms, later ones nothing.

    Where memory cannot be made executable, ``/proc/cpuinfo`` is believed.
    """
    try:
        code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError as error:
        log.warning("no executable memory (%s), so the TSC's frequency is taken from /proc/cpuinfo", error)
        return cpuinfo_khz(Path("/proc/cpuinfo").read_text())
    code.write(_RDTSC)
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    return measured_khz(ctypes.CFUNCTYPE(ctypes.c_uint64)(address))


def measured_khz(read_counter: Callable[[], int]) -> int:
    """Return the median frequency of *read_counter* over a few short stretches of CLOCK_MONOTONIC_RAW."""
    frequencies = []
    for _ in range(_STRETCHES + 1):
        began_ns, began = _pair(read_counter)
        while time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW) - began_ns < _STRETCH_NS:
            pass
        ended_ns, ended = _pair(read_counter)
        frequencies.append((ended - began) * 1_000_000 // (ended_ns - began_ns))
    return sorted(frequencies)[len(frequencies) // 2]


def cpuinfo_khz(text: str) -> int:
    """Return what *text*, the content of ``/proc/cpuinfo``, says in MHz, in kHz."""
    found = re.search(r"^cpu MHz\s*:\s*([0-9.]+)", text, re.MULTILINE)
    if found is None:
        raise ValueError("/proc/cpuinfo does not say how fast the CPU is")
    return round(float(found[1]) * 1000)


def _pair(read_counter: Callable[[], int]) -> tuple[int, int]:
    """Return clock and counter at one moment: of many tries the one that was interrupted least."""
    best: tuple[int, int, int] | None = None
    for _ in range(_PAIR_TRIES):
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        counter = read_counter()
        after = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        if best is None or after - before < best[0]:
            best = (after - before, (before + after) // 2, counter)
    assert best is not None  # noqa: S101  there is at least one try
    return best[1], best[2]
