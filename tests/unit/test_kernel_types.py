"""Argument checks, decoding and messages of the kernel layer: nothing here needs a right or a feature."""

from __future__ import annotations

import errno
from collections.abc import Callable

import numpy as np
import pytest

from uspace_mm.errors import InputError, KernelError, UnsupportedError, UspaceError
from uspace_mm.kernel import madvise, mapping, memfd, pagemap, prctl, proc, process
from uspace_mm.kernel import userfaultfd as u
from uspace_mm.kernel._check import as_int, as_range, check

PAGE = proc.page_size()


def test_a_result_that_is_not_negative_passes() -> None:
    assert check(7, "call") == 7


def test_an_errno_names_call_address_length_and_hint() -> None:
    with pytest.raises(KernelError) as caught:
        check(-errno.EPERM, "ioctl(X)", address=0x1000, length=8, hints={errno.EPERM: "ask root"})
    error = caught.value
    assert (error.call, error.errno, error.address, error.length) == ("ioctl(X)", errno.EPERM, 0x1000, 8)
    assert str(error) == "ioctl(X) at 0x1000, 8 bytes: Operation not permitted [EPERM]; ask root"


@pytest.mark.parametrize("value", ["1", 1.0, None, b"1", [1]])
def test_what_is_no_integer_is_refused(value: object) -> None:
    with pytest.raises(InputError, match="address must be an integer, not"):
        as_range("mmap", value, 1)  # type: ignore[arg-type]


def test_numpy_integers_are_integers() -> None:
    assert as_int("call", "length", np.uint64(5)) == 5


@pytest.mark.parametrize(
    ("address", "length", "why"),
    [
        (0, 0, "length 0"),
        (0, -1, "length -1"),
        (-PAGE, PAGE, "address -"),
        (1 << 64, PAGE, "address 18446744073709551616"),
        ((1 << 64) - PAGE, 2 * PAGE, "past the end of the address space"),
        (1, PAGE, "not a multiple"),
        (PAGE, PAGE + 1, "not a multiple"),
    ],
)
def test_bad_ranges_are_one_line_input_errors(address: int, length: int, why: str) -> None:
    with pytest.raises(InputError, match=why) as caught:
        as_range("call", address, length, align=PAGE)
    assert "\n" not in str(caught.value)


BAD_CALLS: dict[str, Callable[[], object]] = {
    "map of nothing": lambda: mapping.map_memory(0),
    "map of a negative size": lambda: mapping.map_memory(-PAGE),
    "map without a descriptor": lambda: mapping.map_memory(PAGE, flags=mapping.MapFlag.PRIVATE),
    "huge page size without hugetlb": lambda: mapping.map_memory(PAGE, huge_page_size=1 << 21),
    "huge page size that is no power of two": lambda: mapping.map_memory(
        PAGE, flags=mapping.PRIVATE_ANONYMOUS | mapping.MapFlag.HUGETLB, huge_page_size=3 * PAGE
    ),
    "alignment that is no power of two": lambda: mapping.Mapping(PAGE, align=3),
    "unmap of nothing": lambda: mapping.unmap(PAGE, 0),
    "remap to nothing": lambda: mapping.remap(PAGE, PAGE, 0),
    "name with NUL": lambda: memfd.memfd_create("a\0b"),
    "name too long": lambda: memfd.memfd_create("x" * 250),
    "negative memfd": lambda: memfd.memfd_create("x", -1),
    "memfd huge page size without hugetlb": lambda: memfd.memfd_create("x", huge_page_size=1 << 21),
    "advice that does not exist": lambda: madvise.madvise(PAGE, PAGE, 5),  # type: ignore[arg-type]
    "madvise off a page": lambda: madvise.madvise(1, PAGE, madvise.Advice.COLD),
    "negative pid": lambda: process.pidfd_open(-1),
    "pid that is a string": lambda: process.pidfd_open("1"),  # type: ignore[arg-type]
    "negative descriptor": lambda: process.pidfd_getfd(-1, 0),
    "no range": lambda: process.process_madvise(0, [], madvise.Advice.COLD),
    "too many ranges": lambda: process.process_madvise(0, [(PAGE, PAGE)] * 1025, madvise.Advice.COLD),
    "read into bytes": lambda: process.process_read(1, PAGE, b"constant"),
    "read into a string": lambda: process.process_read(1, PAGE, "text"),
    "write nothing": lambda: process.process_write(1, PAGE, b""),
    "thp mode that does not exist": lambda: prctl.set_thp_mode(2),  # type: ignore[arg-type]
    "frame 0": lambda: pagemap.page_flags(np.zeros(1, np.uint64)),
    "negative pagemap pid": lambda: pagemap.Pagemap(-1),
    "negative smaps pid": lambda: proc.smaps(-1),
    "descriptor of a closed userfaultfd": lambda: _closed_uffd().fileno(),
    "adopting a negative descriptor": lambda: u.Userfaultfd.adopt(-1),
}


def _closed_uffd() -> u.Userfaultfd:
    uffd = u.Userfaultfd(5, granted=u.Feature(0), ioctls=u.Ioctl(0), source=u.Source.ANY)
    uffd.detach()
    return uffd


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_one_line(name: str) -> None:
    with pytest.raises(InputError) as caught:
        BAD_CALLS[name]()
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)


def test_copy_checks_its_source_before_the_kernel_sees_it() -> None:
    uffd = u.Userfaultfd(5, granted=u.Feature(0), ioctls=u.Ioctl(0), source=u.Source.ANY)
    try:
        with pytest.raises(InputError, match="more than the 3 bytes of the source"):
            uffd.copy(PAGE, b"abc", PAGE)
        with pytest.raises(InputError, match="a source address needs a length"):
            uffd.copy(PAGE, PAGE)
        with pytest.raises(InputError, match="not a multiple"):
            uffd.copy(PAGE, b"abc")
        with pytest.raises(InputError, match="cannot use a str"):
            uffd.copy(PAGE, "abc")  # type: ignore[arg-type]
    finally:
        uffd.detach()


def test_events_are_decoded() -> None:
    kind = u.EventKind
    fault = u.decode_event(kind.PAGEFAULT, 0b11, 0x7000, (9 << 32) | 42)
    assert fault == u.PageFault(0x7000, u.FaultFlag.WRITE | u.FaultFlag.WP, 42)
    assert u.decode_event(kind.FORK, (7 << 32) | 11, 0, 0) == u.Fork(11)
    assert u.decode_event(kind.REMAP, 1, 2, 3) == u.Remap(1, 2, 3)
    assert u.decode_event(kind.REMOVE, 1, 2, 0) == u.Remove(1, 2)
    assert u.decode_event(kind.UNMAP, 1, 2, 0) == u.Unmap(1, 2)
    with pytest.raises(UnsupportedError, match="0x99"):
        u.decode_event(0x99, 0, 0, 0)


@pytest.mark.parametrize("kind", [kind for kind in u.OutcomeKind if kind is not u.OutcomeKind.INSTALLED])
def test_every_failed_outcome_says_what_to_do(kind: u.OutcomeKind) -> None:
    outcome = u.Outcome(kind, PAGE, errno.EAGAIN, "ioctl(UFFDIO_MOVE)", 0x1000, 2 * PAGE)
    assert not outcome.ok
    with pytest.raises(KernelError) as caught:
        outcome.require()
    assert f"after {PAGE} bytes: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_installed_outcome_is_itself() -> None:
    outcome = u.Outcome(u.OutcomeKind.INSTALLED, PAGE, 0, "c", 0, PAGE)
    assert outcome.require() is outcome


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errno.EPERM, ("vm.unprivileged_userfaultfd", "/dev/userfaultfd", "CAP_SYS_PTRACE", "seccomp")),
        (errno.EACCES, ("vm.unprivileged_userfaultfd", "/dev/userfaultfd", "CAP_SYS_PTRACE")),
        (errno.ENOSYS, ("CONFIG_USERFAULTFD",)),
        (errno.EMFILE, ("ulimit -n",)),
        (errno.ENOENT, ("/dev/userfaultfd does not exist",)),
        (errno.EIO, ("Input/output error",)),
    ],
)
def test_the_remedy_of_a_failed_open_is_named(error: int, words: tuple[str, ...]) -> None:
    failure = u.UserfaultfdUnavailable(u.Source.SYSCALL, error)
    assert failure.exit_status == 3 and failure.errno == error
    for word in words:
        assert word in str(failure)
    assert "\n" not in str(failure)


def test_builders_do_not_change() -> None:
    first = u.UserfaultfdBuilder()
    second = first.require(u.Feature.MOVE).want(u.Feature.POISON).using(u.Source.DEVICE)
    assert first == u.UserfaultfdBuilder()
    assert (second.required, second.wanted, second.source) == (
        u.Feature.MOVE,
        u.Feature.POISON,
        u.Source.DEVICE,
    )


SMAPS = """\
7f0000000000-7f0000200000 rw-p 00000000 00:00 0 
Size:               2048 kB
KernelPageSize:        4 kB
Rss:                2048 kB
Anonymous:          2048 kB
AnonHugePages:      2048 kB
Swap:                  0 kB
THPeligible:           1
VmFlags: rd wr mr mw me ac sd hg 
7f0000200000-7f0000201000 r--s 00001000 08:01 1234                       /tmp/a file: with (deleted)
Rss:                   4 kB
FilePmdMapped:         0 kB
VmFlags: rd mr
"""  # noqa: W291


def test_smaps_are_parsed() -> None:
    first, second = proc.parse_smaps(SMAPS)
    assert (first.start, first.end, first.name) == (0x7F0000000000, 0x7F0000200000, "")
    assert first.huge_bytes == first.rss_bytes == 2 << 20
    assert first.thp_eligible is True
    assert "hg" in first.vm_flags
    assert second.name == "/tmp/a file: with (deleted)"
    assert (second.offset, second.inode, second.permissions) == (0x1000, 1234, "r--s")
    assert second.thp_eligible is None


def test_smaps_of_nothing() -> None:
    assert list(proc.parse_smaps("")) == []


def test_all_errors_have_one_base() -> None:
    assert issubclass(u.UserfaultfdUnavailable, UspaceError)
