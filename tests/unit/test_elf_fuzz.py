"""Damaged and hostile input: whatever the bytes, an audit ends with a report, soon and in bounded memory."""

from __future__ import annotations

import json
import lzma
import tempfile
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.elfs import RW, RX, Ph, elf, relro
from tests.unit.test_elf_containers import COMPRESSIONS, deb_of, tar_of, zip_of
from uspace_mm.elf.audit import audit
from uspace_mm.elf.limits import Limits
from uspace_mm.elf.records import Report
from uspace_mm.elf.render import json as json_form
from uspace_mm.elf.render import junit, sarif, text
from uspace_mm.guest.pagesize import PAGE_SIZES

LIMITS = replace(Limits(), floor_bytes=4 << 20, ratio=10, members=2000, table_bytes=1 << 20)
MEMORY = 96 << 20  # of Python's objects; one piece of a zstd stream may become 32 MiB

ELF = elf((Ph(0, flags=RX), Ph(0x2000, 0x1000, 0x300, flags=RW, align=0x1000), relro(0x2000, 0x3000)))
FILES = {"a.so": ELF, "b/c.txt": b"text" * 50, "d.so": ELF[:0x900]}
SEEDS = {
    "elf": ELF,
    "zip": zip_of(FILES),
    "zip lzma": zip_of(FILES, zipfile.ZIP_LZMA),
    "zip bzip2": zip_of(FILES, zipfile.ZIP_BZIP2),
    "deb": deb_of(lzma.compress(tar_of(FILES)), "data.tar.xz"),
    "deb zst": deb_of(COMPRESSIONS[".zst"](tar_of(FILES)), "data.tar.zst"),
    **{f"tar{suffix}": pack(tar_of(FILES)) for suffix, pack in COMPRESSIONS.items()},
    "nested": tar_of({"layer.tar.gz": COMPRESSIONS[".gz"](tar_of({"x.whl": zip_of(FILES)}))}),
}
INTERESTING = [0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]

mutations = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.floats(0, 1), st.integers(0, 255)),
        st.tuples(st.just("word"), st.floats(0, 1), st.sampled_from(INTERESTING)),
        st.tuples(st.just("cut"), st.floats(0, 1), st.just(0)),
        st.tuples(st.just("drop"), st.floats(0, 1), st.integers(1, 600)),
        st.tuples(st.just("double"), st.floats(0, 1), st.integers(1, 2000)),
    ),
    min_size=1,
    max_size=8,
)


def mutate(data: bytes, steps: list[tuple[str, float, int]]) -> bytes:
    out = bytearray(data)
    for kind, where, value in steps:
        # Headers lie at the beginning: half of all changes go there.
        at = int(where * 2 * min(len(out), 1200)) if where < 0.5 else int((where - 0.5) * 2 * len(out))
        at = min(at, max(len(out) - 1, 0))
        if kind == "set" and out:
            out[at] = value
        elif kind == "word":
            out[at : at + 8] = value.to_bytes(8, "little")[: len(out[at : at + 8])]
        elif kind == "cut":
            del out[at:]
        elif kind == "drop":
            del out[at : at + value]
        elif kind == "double":
            out[at:at] = out[at : at + value]
    return bytes(out)


def look(data: bytes) -> Report:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        report = audit([Path(file.name)], PAGE_SIZES, machine="any", limits=LIMITS)
    json.loads(json.dumps(json_form.render(report)))
    json.dumps(sarif.render(report))
    junit.render(report)
    for line in text.render(report, width=80, everything=True).splitlines():
        assert line.isprintable()
    return report


@pytest.mark.parametrize("seed", SEEDS)
@settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
@given(steps=mutations)
def test_mutated_files_end_in_a_report(seed: str, steps: list[tuple[str, float, int]]) -> None:
    report = look(mutate(SEEDS[seed], steps))
    assert report.exit_status in (0, 1, 2)


@pytest.mark.parametrize("seed", SEEDS)
def test_whole_files_are_judged(seed: str) -> None:
    report = look(SEEDS[seed])
    assert report.files
    assert not report.problems


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    data=st.binary(max_size=3000),
    magic=st.sampled_from([b"", b"\x7fELF\2\1\1", b"PK\3\4", b"!<arch>\ndebian-binary"]),
)
def test_random_bytes_end_in_a_report(data: bytes, magic: bytes) -> None:
    look(magic + data)


segments = st.builds(
    Ph,
    vaddr=st.one_of(st.integers(0, 0x90000), st.sampled_from(INTERESTING[:-2])),
    offset=st.one_of(st.integers(0, 0x90000), st.none()),
    size=st.one_of(st.integers(0, 0x40000), st.sampled_from(INTERESTING[:-2])),
    memsz=st.one_of(st.integers(0, 0x40000), st.none(), st.sampled_from(INTERESTING[:-2])),
    flags=st.integers(0, 7),
    align=st.one_of(st.sampled_from([0, 1, 3, 0x1000, 0x4000, 0x10000, 1 << 63])),
    kind=st.sampled_from([1, 1, 1, 1, 2, 3, 4, 0x6474E552]),
)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(headers=st.lists(segments, max_size=12))
def test_program_headers_that_lie_end_in_a_report(headers: list[Ph]) -> None:
    look(elf(headers, size=0x3000))


def test_many_segments_cost_little() -> None:
    report = look(elf([Ph(i * 0x10000, 0, flags=RW) for i in range(120)], size=0x3000, dynamic=False))
    assert len(report.files) == 1
    report = look(elf([Ph(i, 0) for i in range(3000)], size=0x40000, dynamic=False))
    assert report.files[0].image is None


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_memory_is_bounded(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "bomb"
    bomb = COMPRESSIONS[suffix](tar_of({"x.so": ELF + bytes(128 << 20)}))
    path.write_bytes(bomb)
    tracemalloc.start()
    try:
        audit([path], PAGE_SIZES)
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


def test_a_sparse_file_of_terabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.so"
    path.write_bytes(ELF)
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    (judged,) = audit([path], PAGE_SIZES).files
    assert judged.verdicts[0].status.value == "loads"
