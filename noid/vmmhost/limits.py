"""How much of the host one VM's process may use, from the VM's shape. Pure: numbers in, numbers out."""

from __future__ import annotations

import resource
from dataclasses import dataclass

_MIB = 1 << 20
CPU_PERIOD_US = 100_000
#: Threads a VMM has beside its vCPUs: QEMU's pool for the disk alone may have 64.
_OTHER_THREADS = 128
_OPEN_FILES = 4096
#: A console's log keeps its numbering in its size, though its middle is given back: it may seem to be this large.
_CONSOLE_BYTES = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A VM as far as limits go. *vmm_mib* is what its VMM itself needs beyond what any does."""

    cpus: int
    mem_mib: int
    disk_bytes: int
    vmm_mib: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one process may use.

    Attributes:
        memory_bytes: Guest and VMM together, the page cache of its files included, which gives way.
        cpu_weight: Its share of a busy host: 100 for each vCPU, and 100 for the VMM's own threads, which answer us.
        cpu_quota_us: CPU time in each `CPU_PERIOD_US`: the vCPUs', and one CPU for the VMM's own threads.
        threads: Threads at a time.
        open_files: Descriptors.
        file_bytes: How large a file it writes may become.
    """

    memory_bytes: int
    cpu_weight: int
    cpu_quota_us: int
    threads: int
    open_files: int
    file_bytes: int

    def as_rlimits(self) -> tuple[tuple[int, int], ...]:
        """Return what holds without any cgroup, as pairs for ``setrlimit``. A core would hold the guest's memory."""
        return (
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_NOFILE, self.open_files),
            (resource.RLIMIT_FSIZE, self.file_bytes),
        )


def limits_of(shape: Shape, overhead_mib: int) -> Limits:
    """Return what a VM of *shape* may use."""
    return Limits(
        memory_bytes=(shape.mem_mib + shape.vmm_mib + overhead_mib) * _MIB,
        cpu_weight=min(100 * (shape.cpus + 1), 10_000),
        cpu_quota_us=(shape.cpus + 1) * CPU_PERIOD_US,
        threads=shape.cpus + _OTHER_THREADS,
        open_files=_OPEN_FILES,
        file_bytes=max(2 * shape.disk_bytes, shape.mem_mib * _MIB) + _CONSOLE_BYTES,
    )
