"""userfaultfd against the running kernel: opening, what its ioctls answer, and what is left behind."""

from __future__ import annotations

import errno
import gc
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.kernel.huge import collapse, huge_page_size
from uspace_mm.errors import InputError, KernelError, UnsupportedError
from uspace_mm.kernel import proc
from uspace_mm.kernel.mapping import MapFlag, Mapping, Protection, protect
from uspace_mm.kernel.memfd import memfd_create
from uspace_mm.kernel.pagemap import Category, Pagemap, PagemapBit, has_bits
from uspace_mm.kernel.process import pidfd_getfd, pidfd_open
from uspace_mm.kernel.userfaultfd import (
    Feature,
    Ioctl,
    OutcomeKind,
    RegisterMode,
    Source,
    Userfaultfd,
    UserfaultfdBuilder,
    UserfaultfdUnavailable,
    probe_features,
)

PAGE = proc.page_size()


def lacks(feature: Feature) -> None:
    if feature not in probe_features():
        pytest.skip(f"lacks: {feature!r}")


@pytest.fixture
def uffd() -> Iterator[Userfaultfd]:
    everything = ~Feature.SIGBUS & ~Feature.WP_ASYNC & Feature(sum(Feature))
    wanted = everything & ~(
        Feature.EVENT_FORK | Feature.EVENT_REMAP | Feature.EVENT_REMOVE | Feature.EVENT_UNMAP
    )
    with UserfaultfdBuilder().want(wanted).open() as opened:
        yield opened


def test_every_way_to_open_says_which_it_was() -> None:
    opened_by = []
    for source in (Source.SYSCALL, Source.DEVICE, Source.USER_MODE):
        try:
            opened = UserfaultfdBuilder(source).open()
        except UserfaultfdUnavailable as error:
            assert error.errno in (errno.EPERM, errno.EACCES, errno.ENOENT), error
            continue
        opened_by.append(source)
        with opened:
            assert opened.source is source
            assert os.readlink(f"/proc/self/fd/{opened.fileno()}") == "anon_inode:[userfaultfd]"
            assert not os.get_inheritable(opened.fileno())
            assert not os.get_blocking(opened.fileno())
            assert Ioctl.REGISTER in opened.ioctls
        assert opened.closed
    with UserfaultfdBuilder().open() as opened:
        assert opened.source is opened_by[0]
    if len(opened_by) < 3:
        pytest.skip(f"lacks: the right to open a userfaultfd in more ways than {opened_by}")


def test_granted_is_required_and_what_was_wanted_and_had() -> None:
    available = probe_features()
    invented = Feature(1 << 40)
    builder = UserfaultfdBuilder().require(Feature.EVENT_REMOVE).want(Feature.THREAD_ID | invented)
    with builder.open() as opened:
        assert opened.granted == (Feature.EVENT_REMOVE | Feature.THREAD_ID) & available
    with pytest.raises(UnsupportedError, match="lacks 0x10000000000"):
        UserfaultfdBuilder().require(invented).open()


def test_the_kernels_fdinfo_agrees_on_features() -> None:
    with UserfaultfdBuilder().require(Feature.EVENT_REMOVE | Feature.THREAD_ID).open() as opened:
        info = Path(f"/proc/self/fdinfo/{opened.fileno()}").read_text()
    # "API: aa:<all features>:<ioctls>": what the kernel has, which holds what was granted.
    fields = next(line for line in info.splitlines() if line.startswith("API:")).split(":")
    assert int(fields[2], 16) & int(opened.granted) == int(opened.granted)


def test_copy_and_its_outcomes(uffd: Userfaultfd, memory: Mapping) -> None:
    ioctls = uffd.register(memory.address, memory.length, RegisterMode.MISSING)
    assert Ioctl.COPY in ioctls
    first = uffd.copy(memory.address, b"\x11" * (2 * PAGE))
    assert (first.kind, first.done, first.error) == (OutcomeKind.INSTALLED, 2 * PAGE, 0)
    assert (memory.array[: 2 * PAGE] == 0x11).all()
    again = uffd.copy(memory.address, b"\x22" * PAGE)
    assert (again.kind, again.done, again.error) == (OutcomeKind.ALREADY_THERE, 0, errno.EEXIST)
    with pytest.raises(KernelError) as caught:
        again.require()
    assert (caught.value.call, caught.value.address) == ("ioctl(UFFDIO_COPY)", memory.address)
    assert (memory.array[: 2 * PAGE] == 0x11).all()


def test_a_copy_that_meets_a_present_page_is_partial(uffd: Userfaultfd, memory: Mapping) -> None:
    uffd.register(memory.address, memory.length, RegisterMode.MISSING)
    uffd.copy(memory.address + 2 * PAGE, b"\x33" * PAGE).require()
    outcome = uffd.copy(memory.address, b"\x44" * (4 * PAGE))
    assert (outcome.kind, outcome.done) == (OutcomeKind.PARTIAL, 2 * PAGE)
    assert (memory.array[: 2 * PAGE] == 0x44).all()
    assert (memory.array[2 * PAGE : 3 * PAGE] == 0x33).all()


def test_an_unregistered_range_is_gone(uffd: Userfaultfd, memory: Mapping) -> None:
    uffd.register(memory.address, memory.length, RegisterMode.MISSING)
    uffd.unregister(memory.address, PAGE)
    assert uffd.copy(memory.address, bytes(PAGE)).kind is OutcomeKind.GONE


def test_zeropage_poison_and_healing(uffd: Userfaultfd, memory: Mapping) -> None:
    lacks(Feature.POISON)
    uffd.register(memory.address, memory.length, RegisterMode.MISSING)
    assert uffd.zeropage(memory.address, PAGE).ok
    assert not memory.array[:PAGE].any()
    place = memory.address + PAGE
    assert uffd.poison(place, PAGE).ok
    assert uffd.poison(place, PAGE).kind is OutcomeKind.ALREADY_THERE
    assert uffd.zeropage(place, PAGE).kind is OutcomeKind.ALREADY_THERE
    with Pagemap() as pagemap:
        assert not pagemap.present(place, PAGE).any()
    assert uffd.copy(place, b"\x55" * PAGE).ok
    assert memory.array[PAGE] == 0x55


def test_a_write_protect_marker_is_in_the_way_of_all_but_copy(uffd: Userfaultfd, memory: Mapping) -> None:
    lacks(Feature.WP_UNPOPULATED)
    uffd.register(memory.address, memory.length, RegisterMode.MISSING | RegisterMode.WP)
    source = memory.address + 8 * PAGE
    uffd.copy(source, b"\x31" * PAGE).require()
    uffd.writeprotect(memory.address, PAGE).require()
    assert uffd.zeropage(memory.address, PAGE).kind is OutcomeKind.ALREADY_THERE
    if Feature.POISON in uffd.granted:
        assert uffd.poison(memory.address, PAGE).kind is OutcomeKind.ALREADY_THERE
    if Feature.MOVE in uffd.granted:
        assert uffd.move(memory.address, source, PAGE).kind is OutcomeKind.ALREADY_THERE
    with Pagemap() as pagemap:
        assert not pagemap.present(memory.address, PAGE).any()
        assert has_bits(pagemap.entries(memory.address, PAGE), PagemapBit.UFFD_WP).all()
    assert uffd.copy(memory.address, b"\x32" * PAGE).ok
    assert memory.array[0] == 0x32


def test_move_drops_the_write_protection(uffd: Userfaultfd, memory: Mapping) -> None:
    lacks(Feature.MOVE)
    memory.array[:PAGE] = 1
    uffd.register(memory.address, memory.length, RegisterMode.MISSING | RegisterMode.WP)
    uffd.writeprotect(memory.address, PAGE).require()
    uffd.move(memory.address + PAGE, memory.address, PAGE).require()
    with Pagemap() as pagemap:
        entries = pagemap.entries(memory.address, 2 * PAGE)
    assert not has_bits(entries, PagemapBit.UFFD_WP).any()


def test_a_huge_page_moves_whole(uffd: Userfaultfd, scanner: Pagemap) -> None:
    lacks(Feature.MOVE)
    size = huge_page_size()
    with Mapping(2 * size, align=size) as place:
        place.array[:size] = 0x5B
        collapse(place.address, size)
        uffd.register(place.address, place.length, RegisterMode.MISSING)
        uffd.move(place.address + size, place.address, size).require()
        found = list(scanner.scan(place.address, place.length, any_of=Category.HUGE))
        assert [(region.start, region.length) for region in found] == [(place.address + size, size)]
        assert (place.array[size:] == 0x5B).all()
        uffd.unregister(place.address, place.length)


def test_move_takes_the_page_along(uffd: Userfaultfd, memory: Mapping) -> None:
    lacks(Feature.MOVE)
    memory.array[: 2 * PAGE] = 0x66
    uffd.register(memory.address, memory.length, RegisterMode.MISSING)
    to = memory.address + 8 * PAGE
    assert uffd.move(to, memory.address, 2 * PAGE).ok
    with Pagemap() as pagemap:
        assert not pagemap.present(memory.address, 2 * PAGE).any()
        assert pagemap.present(to, 2 * PAGE).all()
    assert (memory.array[8 * PAGE : 10 * PAGE] == 0x66).all()
    hole = uffd.move(to + 4 * PAGE, memory.address, PAGE)
    assert hole.kind is OutcomeKind.GONE
    assert uffd.move(to + 4 * PAGE, memory.address, PAGE, allow_holes=True).ok
    occupied = uffd.move(to, to + PAGE, PAGE)
    assert occupied.kind is OutcomeKind.ALREADY_THERE


def test_moving_a_page_shared_with_a_child_is_busy(uffd: Userfaultfd, memory: Mapping) -> None:
    lacks(Feature.MOVE)
    memory.array[:PAGE] = 1
    uffd.register(memory.address, memory.length, RegisterMode.MISSING)
    wait_r, wait_w = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(wait_w)
        os.read(wait_r, 1)
        os._exit(0)
    try:
        assert uffd.move(memory.address + PAGE, memory.address, PAGE).kind is OutcomeKind.BUSY
    finally:
        os.close(wait_w)
        os.close(wait_r)
        os.waitpid(child, 0)


def test_continue_maps_what_the_page_cache_has(uffd: Userfaultfd) -> None:
    lacks(Feature.MINOR_SHMEM)
    fd = memfd_create("minor", 2 * PAGE)
    try:
        with (
            Mapping(2 * PAGE, flags=MapFlag.SHARED, fd=fd) as filled,
            Mapping(2 * PAGE, flags=MapFlag.SHARED, fd=fd) as served,
        ):
            filled.array[:PAGE] = 0x77
            uffd.register(served.address, served.length, RegisterMode.MINOR)
            assert uffd.continue_(served.address, PAGE).ok
            assert (served.array[:PAGE] == 0x77).all()
            missing = uffd.continue_(served.address + PAGE, PAGE)
            assert (missing.kind, missing.error) == (OutcomeKind.FAILED, errno.EFAULT)
            assert uffd.continue_(served.address, PAGE).kind is OutcomeKind.ALREADY_THERE
            uffd.unregister(served.address, served.length)
    finally:
        os.close(fd)


def test_closing_turns_what_never_arrived_into_zeros(memory: Mapping) -> None:
    with UserfaultfdBuilder().open() as uffd:
        uffd.register(memory.address, memory.length, RegisterMode.MISSING)
        uffd.copy(memory.address, b"\x12" * PAGE).require()
    assert memory.array[0] == 0x12
    assert not memory.array[PAGE:].any()


def test_registering_twice_with_another_descriptor_is_busy(uffd: Userfaultfd, memory: Mapping) -> None:
    uffd.register(memory.address, memory.length, RegisterMode.MISSING)
    with UserfaultfdBuilder().open() as second:
        with pytest.raises(KernelError, match="registered with another userfaultfd") as caught:
            second.register(memory.address, memory.length, RegisterMode.MISSING)
        assert caught.value.errno == errno.EBUSY


def test_registering_what_is_not_mapped_is_one_line(uffd: Userfaultfd) -> None:
    with Mapping(PAGE) as mapping:
        address = mapping.address
    with pytest.raises(KernelError) as caught:
        uffd.register(address, PAGE, RegisterMode.MISSING)
    assert (caught.value.errno, caught.value.address, caught.value.length) == (errno.EINVAL, address, PAGE)
    assert "\n" not in str(caught.value)


def test_smaps_shows_the_registration(uffd: Userfaultfd, memory: Mapping) -> None:
    assert not {"um", "uw"} & proc.mapping_at(memory.address).vm_flags
    uffd.register(memory.address, memory.length, RegisterMode.MISSING)
    assert "um" in proc.mapping_at(memory.address).vm_flags
    uffd.unregister(memory.address, memory.length)
    assert "um" not in proc.mapping_at(memory.address).vm_flags


def test_protected_memory_is_installed_all_the_same(uffd: Userfaultfd, memory: Mapping) -> None:
    uffd.register(memory.address, memory.length, RegisterMode.MISSING)
    protect(memory.address, PAGE, Protection.READ)
    assert uffd.copy(memory.address, b"\x01" * PAGE).ok
    assert memory.array[0] == 1


def test_a_closed_descriptor_is_an_input_error() -> None:
    uffd = UserfaultfdBuilder().open()
    uffd.close()
    uffd.close()
    with pytest.raises(InputError, match="closed"):
        uffd.read()


def test_no_descriptor_left_says_so_and_leaks_none() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    limit = max(int(name) for name in os.listdir("/proc/self/fd")) + 8
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        with pytest.raises(OSError):
            while True:
                held.append(os.dup(0))
        with pytest.raises(UserfaultfdUnavailable, match="ulimit -n"):
            UserfaultfdBuilder().open()
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_descriptor_taken_from_a_process_works(uffd: Userfaultfd, memory: Mapping) -> None:
    uffd.register(memory.address, memory.length, RegisterMode.MISSING)
    pidfd = pidfd_open(os.getpid())
    try:
        with Userfaultfd.adopt(pidfd_getfd(pidfd, uffd.fileno())) as taken:
            assert taken.copy(memory.address, b"\x21" * PAGE).ok
    finally:
        os.close(pidfd)
    assert memory.array[0] == 0x21


def test_nothing_is_left_after_many_rounds() -> None:
    def once() -> None:
        with Mapping(4 * PAGE) as mapping, UserfaultfdBuilder().want(Feature.MOVE).open() as uffd:
            uffd.register(mapping.address, mapping.length, RegisterMode.MISSING)
            uffd.copy(mapping.address, bytes(PAGE)).require()
            with pytest.raises(KernelError):
                uffd.register(0, PAGE, RegisterMode.MISSING)

    once()
    gc.collect()
    before = len(os.listdir("/proc/self/fd")), _mapped()
    for _ in range(200):
        once()
    assert len(os.listdir("/proc/self/fd")) == before[0]
    # One leaked mapping per round would be 200 times 4 pages.
    assert _mapped() - before[1] < 100 * 4 * PAGE


def _mapped() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
