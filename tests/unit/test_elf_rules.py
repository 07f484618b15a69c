"""Every rule of the page-size audit at its boundaries, on synthesised program headers."""

from __future__ import annotations

import pytest

from tests.elfs import ET_EXEC, RW, RX, Ph, elf, relro
from uspace_mm.elf.image import ElfError, NotLoadableError, read_image
from uspace_mm.elf.records import Kind, Level, Libc, Loader, Status, Verdict
from uspace_mm.elf.source import BytesSource
from uspace_mm.elf.verdict import judge, judge_source
from uspace_mm.guest.pagesize import PAGE_SIZES, parse_page_size

MUSL = ("libc.musl-aarch64.so.1",)
INTERP = "/lib/ld-linux-aarch64.so.1"
MUSL_INTERP = "/lib/ld-musl-aarch64.so.1"
GOOD = (Ph(0, flags=RX), Ph(0x20000, 0x10000, flags=RW))


def verdict(data: bytes, page: str) -> Verdict:
    return judge(read_image(BytesSource(data)), parse_page_size(page))


def statuses(data: bytes) -> list[str]:
    return [judge(read_image(BytesSource(data)), size).status.value for size in PAGE_SIZES]


def told(data: bytes, page: str, level: Level = Level.UNKNOWN) -> list[tuple[str, Loader]]:
    return [(f.rule, f.loader) for f in verdict(data, page).findings if f.level >= level]


def test_a_file_linked_for_64k_loads_everywhere() -> None:
    assert statuses(elf(GOOD)) == ["loads"] * 3
    assert statuses(elf(GOOD, needed=MUSL)) == ["loads"] * 3
    assert statuses(elf(GOOD, needed=())) == ["loads"] * 3
    assert statuses(elf(GOOD, interp=INTERP)) == ["loads"] * 3


@pytest.mark.parametrize(
    ("difference", "expected"),
    [
        (0x10000, ["loads"] * 3),
        (0x8000, ["loads", "loads", "fails"]),
        (0x4000, ["loads", "loads", "fails"]),
        (0x3000, ["loads", "fails", "fails"]),
        (0x1000, ["loads", "fails", "fails"]),
        (0x800, ["fails", "fails", "fails"]),
        (-0x1000, ["loads", "fails", "fails"]),
    ],
)
def test_congruence(difference: int, expected: list[str]) -> None:
    data = elf((Ph(0, flags=RX), Ph(0x40000 + difference, 0x40000, flags=RW)))
    glibc = [dict(verdict(data, size.name).by_loader)[Loader.GLIBC].value for size in PAGE_SIZES]
    assert glibc == expected
    # musl maps such a file, at rounded offsets.
    musl = elf((Ph(0, flags=RX), Ph(0x40000 + difference, 0x40000, flags=RW)), needed=MUSL)
    assert statuses(musl) == [status.replace("fails", "wrong") for status in expected]
    executable = elf((Ph(0, flags=RX), Ph(0x40000 + difference, 0x40000, flags=RW)), interp=INTERP)
    assert statuses(executable) == expected


def test_congruence_names_segment_numbers_and_the_flag() -> None:
    data = elf((Ph(0, flags=RX), Ph(0x21000, 0x10000, flags=RW, align=0x1000)))
    finding = next(f for f in verdict(data, "64k").findings if f.rule == "congruence")
    assert finding.segment == 1
    assert dict(finding.numbers) == {
        "p_vaddr": 0x21000,
        "p_offset": 0x10000,
        "remainder": 0x1000,
        "page": 0x10000,
    }
    assert "-Wl,-z,max-page-size=0x10000" in finding.remedy
    assert "0x21000" in finding.fact


def test_segments_without_bytes_in_the_file_are_not_mapped_by_the_kernel() -> None:
    bss = Ph(0x21000, 0x900, size=0, memsz=0x100, flags=RW, align=0x1000)
    assert statuses(elf((Ph(0, flags=RX), bss), interp=INTERP)) == ["loads"] * 3
    assert statuses(elf((Ph(0, flags=RX), bss))) == ["fails"] * 3


@pytest.mark.parametrize(
    ("align", "expected"),
    [
        (0x10000, ["loads"] * 3),
        (0x4000, ["loads", "loads", "loads with newer glibc"]),
        (0x1000, ["loads", "loads with newer glibc", "loads with newer glibc"]),
        (0x800, ["loads with newer glibc"] * 3),
        (0x18000, ["loads with newer glibc"] * 3),  # no power of two
        (0, ["loads with newer glibc"] * 3),  # then every bit of p_vaddr - p_offset counts
        (0x100000, ["loads with newer glibc"] * 3),
    ],
)
def test_alignment_counts_for_older_glibc_only(align: int, expected: list[str]) -> None:
    headers = (Ph(0, flags=RX), Ph(0x20000, 0x10000, flags=RW, align=align))
    assert statuses(elf(headers)) == expected
    assert statuses(elf(headers, needed=MUSL)) == ["loads"] * 3
    assert statuses(elf(headers, interp=INTERP)) == ["loads"] * 3


def test_alignment_zero_loads_with_older_glibc_where_address_and_offset_are_equal() -> None:
    assert statuses(elf((Ph(0, flags=RX, align=0), Ph(0x20000, flags=RW, align=0)))) == ["loads"] * 3


def test_numpy_16677_every_load_is_looked_at() -> None:
    """patchelf left LOADs with p_align 64K, 64K, 4K, 4K; a look at the first one says that all is well."""
    headers = (
        Ph(0, size=0x9000, flags=RX, align=0x10000),
        Ph(0x1FD00, 0xFD00, flags=RW, align=0x10000),
        Ph(0x31000, 0x21000, flags=RW, align=0x1000),
        Ph(0x43000, 0x24000, flags=RW, align=0x1000),
    )
    assert statuses(elf(headers)) == ["loads", "fails", "fails"]
    found = verdict(elf(headers), "64k").findings
    assert {f.segment for f in found if f.rule == "congruence"} == {3}
    assert {f.segment for f in found if f.rule == "p-align"} == {2, 3}


def test_read_only_data_in_a_page_with_written_data_is_harmless() -> None:
    headers = (Ph(0, size=0x11800), Ph(0x11800, flags=RW), Ph(0x40000, flags=RX))
    for needed in ((), MUSL, ("libc.so.6",)):
        assert statuses(elf(headers, needed=needed)) == ["loads"] * 3
    notes = [f for f in verdict(elf(headers), "64k").findings if f.rule == "overlap"]
    assert [(f.level, f.segment) for f in notes] == [(Level.NOTE, 0)] * 2  # both versions of glibc
    assert not [f for f in verdict(elf((Ph(0, size=0x10000), Ph(0x10000, flags=RW))), "64k").findings]


def test_code_in_a_page_with_data_is_fatal() -> None:
    headers = (Ph(0), Ph(0x10800, size=0x10000, flags=RX), Ph(0x21000, flags=RW))
    assert statuses(elf(headers)) == ["loads", "wrong", "wrong"]
    assert statuses(elf(headers, interp=INTERP)) == ["loads", "wrong", "wrong"]
    assert ("overlap", Loader.GLIBC) in told(elf(headers), "64k")


def test_the_boundary_of_a_shared_page() -> None:
    for end, expected in ((0x20000, ["loads"] * 3), (0x20001, ["wrong"] * 3)):
        headers = (Ph(0), Ph(0x10000, size=end - 0x10000, flags=RX), Ph(0x20001, flags=RW))
        assert statuses(elf(headers)) == expected


def test_glibc_refuses_holes_that_end_before_the_first_segment_does() -> None:
    headers = (Ph(0, size=0x1800), Ph(0x2800, flags=RX), Ph(0x5000, flags=RW))
    findings = verdict(elf(headers), "64k").findings
    assert [f.rule for f in findings if f.level is Level.FAILS] == ["overlap", "overlap"]
    assert verdict(elf(headers), "4k").status is Status.LOADS


def test_musl_maps_the_lowest_page_once() -> None:
    """Code in the page of the first, read-only, segment cannot run; written data kills the loader."""
    code = (Ph(0), Ph(0x2000, flags=RX), Ph(0x20000, flags=RW))
    assert statuses(elf(code, needed=MUSL)) == ["loads", "wrong", "wrong"]
    data = (Ph(0), Ph(0x2000, memsz=0x900, flags=RW), Ph(0x20000, flags=RX))
    assert statuses(elf(data, needed=MUSL)) == ["loads", "fails", "fails"]
    without_bss = (Ph(0), Ph(0x2000, flags=RW), Ph(0x20000, flags=RX))
    assert statuses(elf(without_bss, needed=MUSL)) == ["loads", "wrong", "wrong"]


def test_musl_gives_the_rest_of_written_pages_of_executables_to_malloc() -> None:
    headers = (Ph(0, flags=RX), Ph(0x20000, size=0x1800), Ph(0x21800, flags=RW))
    assert statuses(elf(headers, interp=MUSL_INTERP, needed=MUSL)) == ["wrong"] * 3
    assert statuses(elf(headers, interp=INTERP)) == ["loads"] * 3
    assert statuses(elf(headers, needed=MUSL)) == ["loads"] * 3


def test_bytes_of_a_segment_whose_page_another_file_offset_replaced() -> None:
    headers = (Ph(0, size=0x11000, flags=RX), Ph(0x20800, 0x20800, flags=RW), Ph(0x21000, 0x31000, flags=RW))
    assert statuses(elf(headers)) == ["loads", "wrong", "wrong"]


def test_zeros_that_a_later_mapping_fills_with_the_file() -> None:
    headers = (Ph(0, flags=RX), Ph(0x20000, memsz=0x2000, flags=RW), Ph(0x23000, flags=RW))
    found = [f for f in verdict(elf(headers), "64k").findings if f.level is Level.WRONG]
    assert {f.segment for f in found} == {1}
    assert statuses(elf(headers))[0] == "loads"


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0x20000, 0x30000, ["loads"] * 3),
        (0x20000, 0x24000, ["loads"] * 3),  # 64k: both ends in one page, nothing is protected
        (0x20000, 0x2FFFF, ["loads"] * 3),  # the tail stays writable
        (0x20800, 0x30000, ["wrong"] * 3),  # its first page holds written data before it
        (0x22000, 0x30000, ["loads", "wrong", "wrong"]),
        (0x22000, 0x2F000, ["loads", "wrong", "loads"]),
        (0x20000, 0x51000, ["wrong", "wrong", "wrong"]),  # past what is mapped
        (0x20000, 0x50000, ["wrong", "wrong", "wrong"]),
    ],
)
@pytest.mark.parametrize("needed", [("libc.so.6",), MUSL])
def test_relro(start: int, end: int, expected: list[str], needed: tuple[str, ...]) -> None:
    headers = (Ph(0, flags=RX), Ph(0x20000, size=0x18000, flags=RW), relro(start, end))
    assert statuses(elf(headers, needed=needed)) == expected


def test_relro_that_protects_less_than_it_says_is_noted() -> None:
    headers = (Ph(0, flags=RX), Ph(0x20000, size=0x18000, flags=RW), relro(0x20000, 0x31000))
    data = elf(headers, needed=MUSL)
    assert not verdict(data, "4k").findings
    (tail,) = verdict(data, "64k").findings
    assert (tail.rule, tail.level) == ("relro", Level.NOTE)
    assert "0x1000 bytes from 0x30000" in tail.fact
    one_page = elf(
        (Ph(0, flags=RX), Ph(0x20000, size=0x18000, flags=RW), relro(0x20000, 0x21000)), needed=MUSL
    )
    (nothing,) = verdict(one_page, "64k").findings
    assert "lies in one page" in nothing.fact


def test_bionic_protects_every_page_that_relro_touches() -> None:
    """lld with max-page-size=0x4000 and a common page of 4K: written data in RELRO's last page."""
    bionic = ("libc.so", "libm.so", "libdl.so")
    headers = (Ph(0, flags=RX), Ph(0x20000, size=0x18000, flags=RW), relro(0x20000, 0x31000))
    assert statuses(elf(headers, needed=bionic)) == ["loads", "wrong", "wrong"]
    assert statuses(elf(headers, needed=MUSL)) == ["loads"] * 3
    aligned = (Ph(0, flags=RX), Ph(0x20000, size=0x18000, flags=RW), relro(0x20000, 0x30000))
    assert statuses(elf(aligned, needed=bionic)) == ["loads"] * 3
    alone = (Ph(0, flags=RX), Ph(0x20000, size=0x1000, flags=RW), relro(0x20000, 0x21000))
    assert statuses(elf(alone, needed=bionic)) == ["loads"] * 3


def test_relro_takes_the_right_to_run_from_code_before_it() -> None:
    headers = (
        Ph(0),
        Ph(0x10000, size=0x800, flags=7),
        Ph(0x11000, size=0x20000, flags=RW),
        relro(0x11000, 0x30000),
    )
    found = [f for f in verdict(elf(headers), "64k").findings if f.rule == "relro" and f.level > Level.NOTE]
    assert found and all("LOAD 1" in f.fact for f in found)


def test_jemalloc_is_unknown_on_larger_pages() -> None:
    message = b"<jemalloc>: Unsupported system page size\n"
    report = judge_source("x", "aarch64", BytesSource(elf(GOOD, text=message)), PAGE_SIZES)
    assert [v.status for v in report.verdicts] == [Status.LOADS, Status.UNKNOWN, Status.UNKNOWN]
    worse = elf((Ph(0, flags=RX), Ph(0x21000, 0x10000, flags=RW, align=0x1000)), text=message)
    report = judge_source("x", "aarch64", BytesSource(worse), PAGE_SIZES)
    assert [v.status for v in report.verdicts] == [Status.LOADS, Status.FAILS, Status.FAILS]


def test_jemalloc_message_across_two_reads_is_found() -> None:
    message = b"<jemalloc>: Unsupported system page size\n"
    for at in ((1 << 20) - 20, (1 << 20) - len(message), 1 << 20):
        data = bytearray(elf((Ph(0, size=0x200000, flags=RX),)))
        data[at : at + len(message)] = message
        report = judge_source("x", "aarch64", BytesSource(bytes(data)), PAGE_SIZES)
        (finding,) = {f.fact for f in report.verdicts[2].findings if f.rule == "jemalloc"}
        assert f"{at:#x}" in finding


@pytest.mark.parametrize(
    ("arguments", "kind", "libc"),
    [
        ({}, Kind.LIBRARY, Libc.GLIBC),
        ({"needed": ("libm.so.6",)}, Kind.LIBRARY, Libc.GLIBC),
        ({"needed": ()}, Kind.LIBRARY, Libc.UNKNOWN),
        ({"needed": MUSL}, Kind.LIBRARY, Libc.MUSL),
        ({"needed": ("libc.so",)}, Kind.LIBRARY, Libc.MUSL),
        ({"needed": ("libc.so", "libdl.so")}, Kind.LIBRARY, Libc.BIONIC),
        ({"interp": INTERP}, Kind.EXECUTABLE, Libc.GLIBC),
        ({"interp": MUSL_INTERP, "needed": ()}, Kind.EXECUTABLE, Libc.MUSL),
        ({"interp": "/system/bin/linker64", "needed": ()}, Kind.EXECUTABLE, Libc.BIONIC),
        ({"interp": INTERP, "soname": "libc.so.6"}, Kind.BOTH, Libc.GLIBC),
        ({"soname": "ld-linux-aarch64.so.1", "needed": ()}, Kind.BOTH, Libc.GLIBC),
        ({"pie": True, "needed": ()}, Kind.EXECUTABLE, Libc.UNKNOWN),
        ({"kind": ET_EXEC, "dynamic": False}, Kind.EXECUTABLE, Libc.UNKNOWN),
    ],
)
def test_whose_file_it_is(arguments: dict[str, object], kind: Kind, libc: Libc) -> None:
    image = read_image(BytesSource(elf(GOOD, **arguments)))  # type: ignore[arg-type]
    assert (image.kind, image.libc) == (kind, libc)
    assert not image.damage


def test_libcs_that_differ_are_both_told() -> None:
    headers = (Ph(0, flags=RX), Ph(0x21000, 0x10000, flags=RW))
    answer = dict(verdict(elf(headers, needed=()), "64k").by_loader)
    assert answer == {
        Loader.GLIBC: Status.FAILS,
        Loader.GLIBC_OLD: Status.FAILS,
        Loader.MUSL: Status.WRONG,
    }


def test_bionic_wants_the_alignment() -> None:
    headers = (Ph(0, flags=RX, align=0x4000), Ph(0x20000, 0x10000, flags=RW, align=0x4000))
    assert statuses(elf(headers, needed=("libc.so", "libm.so"))) == ["loads", "loads", "fails"]


def test_truncated_and_contradicting_headers_fail_on_every_page_size() -> None:
    whole = elf(GOOD)
    assert statuses(elf(GOOD, size=len(whole) - 1)) == ["fails"] * 3
    assert statuses(whole) == ["loads"] * 3
    assert statuses(elf((Ph(0, flags=RX), Ph(0x20000, size=0x800, memsz=0x100, flags=RW)))) == ["wrong"] * 3
    assert statuses(elf((Ph(0, flags=RX), Ph(1 << 50, 0x10000, flags=RW)))) == ["fails"] * 3
    descending = (Ph(0x20000, 0, flags=RX), Ph(0x10000, flags=RW))
    assert all(status in ("wrong", "fails") for status in statuses(elf(descending)))


@pytest.mark.parametrize("length", [0, 3, 4, 15, 16, 40, 63, 64, 100, 119])
def test_cut_headers_say_so(length: int) -> None:
    with pytest.raises(ElfError, match="truncated|no ELF header"):
        read_image(BytesSource(elf(GOOD)[:length]))


def test_what_nobody_loads_is_told_apart() -> None:
    with pytest.raises(NotLoadableError):
        read_image(BytesSource(elf(GOOD, kind=1)))
    with pytest.raises(NotLoadableError):
        read_image(BytesSource(elf(GOOD, kind=4)))
    empty_dynamic = Ph(0x100, size=0, memsz=0x200, kind=2)
    with pytest.raises(NotLoadableError):
        read_image(BytesSource(elf((*GOOD, empty_dynamic), dynamic=False)))
    with pytest.raises(ElfError):
        read_image(BytesSource(elf((), dynamic=False)))


def test_a_lying_dynamic_section_costs_the_libc_only() -> None:
    lying = Ph(0x100, 0x7FFFFFFF0000, size=0x7FFFFFFFFFFF, kind=2)
    image = read_image(BytesSource(elf((*GOOD, lying), dynamic=False)))
    assert image.damage
    assert image.libc is Libc.UNKNOWN
