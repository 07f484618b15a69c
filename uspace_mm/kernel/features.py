"""What this kernel has and this user may use: found by trying, never by a version number.

:func:`probe_all` is what ``uspace-mm doctor`` prints; :func:`pager_verdict` says whether a pager can work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from uspace_mm.errors import UspaceError
from uspace_mm.kernel import _probes as p
from uspace_mm.kernel import _probes_userfaultfd as u
from uspace_mm.kernel._probes import Finding
from uspace_mm.kernel.madvise import Advice
from uspace_mm.kernel.userfaultfd import (
    Feature,
    RegisterMode,
    Source,
    UserfaultfdUnavailable,
    probe_features,
)

Try = Callable[[], Finding]


@dataclass(frozen=True, slots=True)
class Probe:
    """One row: is the feature there, how that was found out, what for, and what is done without it."""

    name: str
    present: bool
    how: str
    used_for: str
    instead: str


_MISSING, _WP, _MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR

# name, used for, without it, the probe
_TABLE: tuple[tuple[str, str, str, Try], ...] = (
    ("pager basics", "every region", "nothing: the pager cannot work", u.pager_basics),
    (
        "userfaultfd(2)",
        "faults of system calls and KVM too",
        "the device file, else user mode only",
        partial(u.opens, Source.SYSCALL),
    ),
    (
        "/dev/userfaultfd",
        "the same without a capability",
        "the system call, else user mode only",
        partial(u.opens, Source.DEVICE),
    ),
    (
        "user mode only",
        "faults of user code without rights",
        "a descriptor with more rights",
        partial(u.opens, Source.USER_MODE),
    ),
    (
        "EVENT_REMOVE",
        "following madvise",
        "nothing: stale pages",
        partial(u.granted, Feature.EVENT_REMOVE),
    ),
    (
        "EVENT_UNMAP",
        "following munmap",
        "nothing: stale regions",
        partial(u.granted, Feature.EVENT_UNMAP),
    ),
    (
        "EVENT_REMAP",
        "following mremap",
        "nothing: regions must not move",
        partial(u.granted, Feature.EVENT_REMAP),
    ),
    (
        "EVENT_FORK",
        "managers that serve forking processes (CAP_SYS_PTRACE)",
        "MADV_DONTFORK or taking over in the child",
        partial(u.granted, Feature.EVENT_FORK),
    ),
    (
        "SIGBUS",
        "serving a fault in the faulting thread",
        "handler threads",
        partial(u.granted, Feature.SIGBUS),
    ),
    (
        "THREAD_ID",
        "statistics per thread",
        "statistics per region only",
        partial(u.granted, Feature.THREAD_ID),
    ),
    (
        "EXACT_ADDRESS",
        "prefetch that sees strides within a page",
        "page addresses",
        partial(u.granted, Feature.EXACT_ADDRESS),
    ),
    (
        "MISSING_SHMEM",
        "regions shared between processes",
        "private regions",
        partial(u.registers_shared, Feature.MISSING_SHMEM, _MISSING),
    ),
    (
        "MINOR_SHMEM",
        "mapping pages that another process filled",
        "copying them",
        partial(u.registers_shared, Feature.MINOR_SHMEM, _MINOR),
    ),
    (
        "MISSING_HUGETLBFS",
        "hugetlb regions",
        "transparent huge pages, moved whole",
        partial(u.registers_hugetlb, Feature.MISSING_HUGETLBFS, _MISSING),
    ),
    (
        "MINOR_HUGETLBFS",
        "mapping hugetlb pages already there",
        "copying them",
        partial(u.registers_hugetlb, Feature.MINOR_HUGETLBFS, _MINOR),
    ),
    (
        "PAGEFAULT_FLAG_WP",
        "seeing writes as they happen",
        "comparing contents at eviction",
        u.write_protect,
    ),
    (
        "WP_UNPOPULATED",
        "write-protecting missing pages",
        "populating them first",
        u.write_protect_unpopulated,
    ),
    (
        "WP_HUGETLBFS_SHMEM",
        "seeing writes to shared memory",
        "comparing contents",
        partial(u.registers_shared, Feature.WP_HUGETLBFS_SHMEM, _WP),
    ),
    (
        "WP_ASYNC",
        "dirty pages of precopy without a handler",
        "synchronous write-protect: a fault per page",
        u.write_protect_async,
    ),
    (
        "POISON",
        "a lost page is SIGBUS, not zeros",
        "a mapping past the end of an empty memfd",
        u.poison,
    ),
    ("MOVE", "evicting and installing without a copy", "COPY, write-protect, MADV_DONTNEED", u.move),
    (
        "MOVE in batches",
        "evicting many pages at the price of a few",
        "COPY, write-protect, MADV_DONTNEED",
        u.move_in_batches,
    ),
    ("pagemap", "what MOVE did; present pages", "mincore, which cannot tell markers", p.pagemap_readable),
    ("PAGEMAP_SCAN", "finding written and huge pages", "reading pagemap and smaps", p.pagemap_scan),
    (
        "frame numbers",
        "page flags of huge memory (CAP_SYS_ADMIN)",
        "PAGEMAP_SCAN and smaps",
        p.frame_numbers,
    ),
    ("soft-dirty", "nothing yet: WP_ASYNC is better", "WP_ASYNC", p.soft_dirty),
    (
        "idle page tracking",
        "notifier.Ages: pages read or written, one by one",
        "accessed bits of whole mappings",
        p.idle_tracking,
    ),
    (
        "MADV_POPULATE_WRITE",
        "staging without faults",
        "touching each page",
        partial(p.advice, Advice.POPULATE_WRITE),
    ),
    ("MADV_COLD", "marking pages for reclaim", "nothing", partial(p.advice, Advice.COLD)),
    (
        "MADV_PAGEOUT",
        "giving pages to swap at once",
        "waiting for memory pressure",
        partial(p.advice, Advice.PAGEOUT),
    ),
    (
        "MADV_DONTNEED_LOCKED",
        "dropping locked pages",
        "munlock, then DONTNEED",
        partial(p.advice, Advice.DONTNEED_LOCKED),
    ),
    ("MADV_COLLAPSE", "making memory huge on demand", "waiting for khugepaged", p.collapse),
    ("MADV_GUARD_INSTALL", "guard pages without mappings", "mprotect(PROT_NONE)", p.guard_pages),
    ("guards in pagemap", "telling guards from holes", "one's own table", p.guard_in_pagemap),
    ("huge pages", "units as large as a huge page", "units of base pages", p.thp_configured),
    ("huge page sizes", "units between base and huge page", "either of these", p.thp_sizes),
    (
        "huge page settings",
        "thp commands that change them (root)",
        "reading them only",
        p.thp_writable,
    ),
    (
        "PR_THP_EXCEPT_ADVISED",
        "huge pages for one's own regions only",
        "switching them off altogether",
        p.thp_except_advised,
    ),
    ("hugetlb pages", "hugetlb regions", "transparent huge pages (or vm.nr_hugepages)", p.hugetlb_pages),
    (
        "MAP_FIXED_NOREPLACE",
        "restoring mappings safely",
        "a hint, and looking where it went",
        p.fixed_noreplace,
    ),
    (
        "MREMAP_DONTUNMAP",
        "taking pages away in one step",
        "copy and MADV_DONTNEED",
        p.remap_dontunmap,
    ),
    ("memfd seals", "sharing memory with peers one does not trust", "nothing", p.memfd_seals),
    ("pidfd_getfd", "managers that take a userfaultfd over", "passing it over a socket", p.pidfd),
    (
        "process_madvise",
        "collapsing and cooling other processes (CAP_SYS_NICE)",
        "madvise in the process itself",
        p.process_advice,
    ),
    (
        "io_uring fixed buffers",
        "following pinned buffers (kernel.io_uring_disabled=0)",
        "ordinary reads and writes",
        p.io_uring_buffers,
    ),
    ("process_vm_readv", "reading other processes", "/proc/PID/mem", p.process_memory),
)


def feature_names() -> list[str]:
    """The names that :func:`probe_all` probes, in its order."""
    return [row[0] for row in _TABLE]


def probe_all(names: Iterable[str] | None = None) -> list[Probe]:
    """Probe every feature, or those in `names`; takes some 30 ms and leaves nothing behind.

    An error of the kernel means absent, and its message becomes ``how``.
    """
    chosen = None if names is None else set(names)
    rows = (row for row in _TABLE if chosen is None or row[0] in chosen)
    return [_probe(*row) for row in rows]


def _probe(name: str, used_for: str, instead: str, attempt: Try) -> Probe:
    try:
        finding = attempt()
    except UspaceError as error:
        finding = p.failure(error)
    return Probe(name, finding.present, finding.how, used_for, instead)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the pager works here; if not, or only in part, ``remedy`` is one line on why and what to do.

    ``source`` is the way a descriptor was had; with USER_MODE system calls that touch a missing page fail.
    """

    works: bool
    source: Source | None
    remedy: str


def pager_verdict() -> Verdict:
    """Try what no pager can do without."""
    try:
        probe_features()
        basics = u.pager_basics()
    except UserfaultfdUnavailable as error:
        return Verdict(False, None, str(error))
    except UspaceError as error:
        return Verdict(False, None, f"userfaultfd opens, but {error}")
    if not basics.present:
        return Verdict(False, None, f"userfaultfd opens, but a page did not arrive: {basics.how}")
    for source in (Source.SYSCALL, Source.DEVICE):
        if _opens(source):
            return Verdict(True, source, "")
    return Verdict(
        True,
        Source.USER_MODE,
        "only user-mode faults are served: a system call that touches a missing page gets EFAULT; for more, "
        "sysctl vm.unprivileged_userfaultfd=1, or give your group /dev/userfaultfd, or grant CAP_SYS_PTRACE",
    )


def _opens(source: Source) -> bool:
    try:
        return u.opens(source).present
    except UspaceError:
        return False
