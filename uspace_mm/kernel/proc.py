"""What /proc and /sys say about pages: sizes, CPUs, hugetlb pools, and the mappings of a process."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from uspace_mm.errors import InputError, KernelError, UnsupportedError
from uspace_mm.kernel._check import PAGE_SIZE, as_pid

_HUGETLB = Path("/sys/kernel/mm/hugepages")
_POOL = re.compile(r"hugepages-(\d+)kB")
_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) \S+ (\d+)\s*(.*)")


def page_size() -> int:
    """Bytes of a base page."""
    return PAGE_SIZE


def pmd_size() -> int | None:
    """Bytes of a PMD-mapped transparent huge page; None when the kernel has none."""
    try:
        return int(Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").read_text())
    except FileNotFoundError:
        return None


def allowed_cpus() -> list[int]:
    """CPUs that this thread may run on, in order."""
    return sorted(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class HugetlbPool:
    """Pages of one hugetlb size: in the pool, free, promised to mappings, and above the pool's size."""

    page_size: int
    total: int
    free: int
    reserved: int
    surplus: int
    overcommit: int

    @property
    def available(self) -> int:
        """Pages that a new mapping can have without enlarging the pool."""
        return self.free - self.reserved + max(self.overcommit - self.surplus, 0)


def hugetlb_pools() -> list[HugetlbPool]:
    """The pools of this machine, smallest page first; empty without CONFIG_HUGETLBFS."""
    pools = []
    for folder in _HUGETLB.iterdir() if _HUGETLB.is_dir() else ():
        if match := _POOL.fullmatch(folder.name):
            names = ("nr", "free", "resv", "surplus", "nr_overcommit")
            values = [int((folder / f"{name}_hugepages").read_text()) for name in names]
            pools.append(HugetlbPool(int(match[1]) * 1024, *values))
    return sorted(pools, key=lambda pool: pool.page_size)


def default_hugetlb_size() -> int:
    """Bytes of the hugetlb page that a mapping gets when it names no size.

    Raises UnsupportedError on a kernel without hugetlb.
    """
    match = re.search(r"^Hugepagesize:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    if not match:
        raise UnsupportedError("this kernel has no hugetlb pages (CONFIG_HUGETLBFS)")
    return int(match[1]) * 1024


@dataclass(frozen=True, slots=True)
class MemoryMapping:
    """One entry of /proc/PID/smaps; the ``*_bytes`` are resident amounts.

    ``huge_bytes`` is what PMDs map: anonymous, shared memory and file pages together.
    ``referenced_bytes``: used since :func:`clear_referenced`.
    ``thp_eligible`` is None on kernels that do not tell. ``vm_flags`` are the two-letter codes of
    proc_pid_smaps(5), e.g. ``um`` (userfaultfd missing), ``uw`` (write-protect), ``hg``, ``nh``, ``ht``.
    """

    start: int
    end: int
    permissions: str
    offset: int
    inode: int
    name: str
    page_size: int
    rss_bytes: int
    referenced_bytes: int
    anonymous_bytes: int
    swap_bytes: int
    anon_huge_bytes: int
    shmem_huge_bytes: int
    file_huge_bytes: int
    hugetlb_bytes: int
    thp_eligible: bool | None
    vm_flags: frozenset[str]

    @property
    def huge_bytes(self) -> int:
        """Bytes mapped by PMDs of transparent huge pages."""
        return self.anon_huge_bytes + self.shmem_huge_bytes + self.file_huge_bytes


def parse_smaps(text: str) -> Iterator[MemoryMapping]:
    """The mappings in the text of an smaps file, in address order."""
    header: re.Match[str] | None = None
    fields: dict[str, str] = {}
    for line in text.splitlines():
        if match := _HEADER.fullmatch(line):
            if header:
                yield _mapping(header, fields)
            header, fields = match, {}
        else:
            key, _, value = line.partition(":")
            fields[key] = value.strip()
    if header:
        yield _mapping(header, fields)


def _mapping(header: re.Match[str], fields: dict[str, str]) -> MemoryMapping:
    def size(key: str) -> int:
        return int(fields.get(key, "0").split()[0]) * 1024

    eligible = fields.get("THPeligible")
    return MemoryMapping(
        start=int(header[1], 16),
        end=int(header[2], 16),
        permissions=header[3],
        offset=int(header[4], 16),
        inode=int(header[5]),
        name=header[6],
        page_size=size("KernelPageSize"),
        rss_bytes=size("Rss"),
        referenced_bytes=size("Referenced"),
        anonymous_bytes=size("Anonymous"),
        swap_bytes=size("Swap"),
        anon_huge_bytes=size("AnonHugePages"),
        shmem_huge_bytes=size("ShmemPmdMapped"),
        file_huge_bytes=size("FilePmdMapped"),
        hugetlb_bytes=size("Private_Hugetlb") + size("Shared_Hugetlb"),
        thp_eligible=None if eligible is None else eligible == "1",
        vm_flags=frozenset(fields.get("VmFlags", "").split()),
    )


def smaps(pid: int = 0) -> list[MemoryMapping]:
    """The mappings of process `pid` (0: the caller). The kernel walks every page table entry for this.

    Raises KernelError: ENOENT or ESRCH when the process has gone, EACCES without ptrace rights.
    """
    number = as_pid("smaps", pid, low=0)
    path = Path("/proc") / (str(number) if number else "self") / "smaps"
    try:
        return list(parse_smaps(path.read_text(errors="surrogateescape")))
    except OSError as error:
        hint = "needs the rights of ptrace(2)" if isinstance(error, PermissionError) else "no such process"
        raise KernelError(f"read({path})", error.errno or 0, hint=hint) from None


def clear_referenced(pid: int = 0) -> None:
    """Have ``referenced_bytes`` of all mappings of process `pid` (0: the caller) count from now on.

    Clears the accessed bits of all its page table entries (proc_pid_clear_refs(5), 1), which the kernel's
    reclaim looks at, too; translations that a CPU still holds do not set them again. Raises KernelError:
    ENOENT or ESRCH when the process has gone, EACCES without the right to write there.
    """
    number = as_pid("clear_refs", pid, low=0)
    path = Path("/proc") / (str(number) if number else "self") / "clear_refs"
    try:
        path.write_text("1")
    except OSError as error:
        hint = "needs the same user" if isinstance(error, PermissionError) else "no such process"
        raise KernelError(f"write({path})", error.errno or 0, hint=hint) from None


def mapping_at(address: int, pid: int = 0) -> MemoryMapping:
    """The mapping of process `pid` that holds `address`; raises InputError when none does."""
    for mapping in smaps(pid):
        if mapping.start <= address < mapping.end:
            return mapping
    raise InputError(f"nothing is mapped at {address:#x} in process {pid or 'self'}")
