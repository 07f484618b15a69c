"""The order in which modules load, and the figures of vmlinux: ELF files made by hand."""

from __future__ import annotations

import gzip
import lzma
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernel_images import BANNER, image, write
from uspace_mm.errors import InputError
from uspace_mm.guest.kernel import comparison
from uspace_mm.guest.kernel.inspection import inspect
from uspace_mm.guest.kernel.modules import Modules, read_modinfo, unpack
from uspace_mm.guest.kernel.sections import Sections

WRITE, ALLOC, EXEC = 1, 2, 4
PROGBITS, NOBITS = 1, 8


def elf(*sections: tuple[str, int, int, bytes | int], machine: int = 183) -> bytes:
    """An ELF file with sections (name, type, flags, content or size)."""
    names = b"\0.shstrtab\0"
    rows = [bytes(64)]
    body = b""
    for name, kind, flags, content in (*sections, (".shstrtab", 3, 0, b"")):
        offset = names.find(b"\0" + name.encode() + b"\0") + 1
        if not offset:
            offset = len(names)
            names += name.encode() + b"\0"
        data = names if name == ".shstrtab" else content
        size = data if isinstance(data, int) else len(data)
        rows.append(struct.pack("<IIQQQQIIQQ", offset, kind, flags, 0, 64 + len(body), size, 0, 0, 1, 0))
        body += b"" if isinstance(data, int) else data
    ident = b"\x7fELF\2\1\1" + bytes(9)
    start = 64 + len(body)
    count = len(rows)
    header = struct.pack("<HHIQQQIHHHHHH", 1, machine, 1, 0, 0, start, 0, 64, 0, 0, 64, count, count - 1)
    return ident + header + body + b"".join(rows)


def module(name: str, **info: str) -> bytes:
    records = "".join(f"{key}={value}\0" for key, value in {**info, "name": name}.items())
    return elf((".modinfo", PROGBITS, ALLOC, records.encode()))


def tree(folder: Path, modules: dict[str, bytes], builtin: str = "", aliases: str = "") -> Modules:
    for name, data in modules.items():
        path = folder / "kernel" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (folder / "modules.builtin").write_text(builtin)
    (folder / "modules.builtin.modinfo").write_text(aliases)
    return Modules(folder)


def test_what_is_needed_comes_first(tmp_path: Path) -> None:
    modules = tree(
        tmp_path,
        {
            "fs/ext4/ext4.ko.xz": lzma.compress(
                module("ext4", depends="jbd2,mb-cache", softdep="pre: crypto-crc32c post: after_ext4")
            ),
            "fs/jbd2/jbd2.ko": module("jbd2", depends="crc16,builtin_one"),
            "fs/mb-cache.ko.gz": gzip.compress(module("mb_cache", depends="")),
            "lib/crc16.ko": module("crc16"),
            "fs/after_ext4.ko": module("after_ext4", depends="crc16"),
            "crypto/crc32c_generic.ko": module("crc32c_generic", alias="crypto-crc32c", depends="crc16"),
            "drivers/unrelated.ko": b"not even ELF",
        },
        builtin="kernel/lib/builtin-one.ko\n",
    )
    order = [name for name, _ in modules.order(["ext4"])]
    assert order == ["crc16", "crc32c_generic", "jbd2", "mb_cache", "ext4", "after_ext4"]
    assert [name for name, _ in modules.order(["crc16", "mb_cache", "crc16"])] == ["crc16", "mb_cache"]


def test_built_in_ones_and_their_aliases_are_left_out(tmp_path: Path) -> None:
    modules = tree(
        tmp_path,
        {"a.ko": module("a", depends="b", softdep="pre: crypto-x  nowhere")},
        builtin="kernel/b.ko\n",
        aliases="crc.alias=crypto-x\0crc.license=GPL\0",
    )
    assert [name for name, _ in modules.order(["b", "a"])] == ["a"]


def test_circles_of_soft_dependencies_end(tmp_path: Path) -> None:
    modules = tree(tmp_path, {"a.ko": module("a", softdep="pre: b"), "b.ko": module("b", softdep="pre: a")})
    assert sorted(name for name, _ in modules.order(["a"])) == ["a", "b"]


def test_missing_modules_are_named(tmp_path: Path) -> None:
    modules = tree(tmp_path, {"a.ko": module("a", depends="gone")})
    with pytest.raises(InputError, match="module gone, which a needs,"):
        modules.order(["a"])
    with pytest.raises(InputError, match="module other is neither"):
        modules.order(["other"])


@pytest.mark.parametrize("data", [b"", b"text", elf((".text", PROGBITS, ALLOC, b"x")), module("a")[:80]])
def test_what_is_no_module_is_refused(data: bytes) -> None:
    with pytest.raises(InputError, match="no kernel module"):
        read_modinfo(data, "a.ko")


@pytest.mark.parametrize(
    "data", [lzma.compress(b"x" * 999)[:-20], lzma.compress(b"x" * 999)[:40] + b"\1" * 40]
)
def test_damaged_packed_modules_are_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(InputError, match="a.ko"):
        unpack(write(tmp_path / "a.ko.xz", data))


def vmlinux(text: int = 1000, read_only: int = 500, data: int = 300, bss: int = 7 << 30) -> bytes:
    return elf(
        (".text", PROGBITS, ALLOC | EXEC, BANNER.ljust(text, b"\0")),
        (".rodata", PROGBITS, ALLOC, bytes(read_only)),
        (".text.writable", PROGBITS, ALLOC | EXEC | WRITE, bytes(10)),
        (".data", PROGBITS, ALLOC | WRITE, bytes(data)),
        (".bss", NOBITS, ALLOC | WRITE, bss),
        (".comment", PROGBITS, 0, bytes(5000)),
    )


def test_sections_add_up_by_the_definition(tmp_path: Path) -> None:
    found = inspect(write(tmp_path / "vmlinux", vmlinux()))
    assert found.sections == Sections(1510, 300, 7 << 30)
    assert (found.kind, found.page_size, found.page_size_from) == ("vmlinux", None, "not said")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (elf((".text", PROGBITS, ALLOC, BANNER), machine=62), "x86|X86"),
        (elf((".comment", PROGBITS, 0, BANNER)), "no vmlinux"),
        (vmlinux()[:-300], "cannot be read"),
        (gzip.compress(vmlinux()), "unpack it first"),
        (b"\x7fELF" + bytes(60) + BANNER, "cannot be read"),
    ],
    ids=["x86", "object", "cut", "packed", "zeros"],
)
def test_what_is_no_vmlinux_gets_one_line(tmp_path: Path, data: bytes, expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        inspect(write(tmp_path / "vmlinux", data))
    assert "\n" not in str(caught.value)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_a_damaged_vmlinux_is_an_input_error_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    damaged = bytearray(vmlinux())
    tables = [*range(64), *range(len(damaged) - 8 * 64, len(damaged))]
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.sampled_from(tables))] = data.draw(st.sampled_from([0, 1, 0x7F, 0xFF]))
    try:
        inspect(write(tmp_path / "vmlinux", bytes(damaged)))
    except InputError as error:
        assert "\n" not in str(error)


def test_header_and_configuration_that_differ_are_a_contradiction(tmp_path: Path) -> None:
    fine = inspect(write(tmp_path / "a", image(2, "CONFIG_ARM64_16K_PAGES=y\n")))
    assert (fine.page_size_from, fine.contradiction) == ("header", None)
    bad = inspect(write(tmp_path / "b", image(1, "CONFIG_ARM64_16K_PAGES=y\n")))
    assert bad.contradiction == "the header says 4k pages, the configuration inside 16k"
    old = inspect(write(tmp_path / "c", image(0, "CONFIG_ARM64_64K_PAGES=y\n")))
    assert (str(old.page_size), old.page_size_from) == ("64k", "IKCONFIG")


def test_kernels_are_compared_in_kb_and_percent(tmp_path: Path) -> None:
    for name, code, extra in (("a", 1, 0), ("b", 3, 1 << 10)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "Image", image(code) + bytes(2 * extra))
        write(tmp_path / name / "vmlinux", vmlinux(text=1024 + extra - 510, data=2048 + extra))
    a, b = (comparison.measure(str(tmp_path / name / "Image")) for name in "ab")
    assert a.kb == {"image": len(image(1)) / 1024, "text": 1.0, "data": 2.0}
    assert b.difference("text", a) == (1.0, 100.0)
    assert b.difference("data", a) == (1.0, 50.0)
    image_difference = b.difference("image", a)
    assert image_difference is not None
    assert image_difference[0] == 2.0
    assert image_difference[1] == pytest.approx(200 * 1024 / len(image(1)))
    assert [item.label for item in comparison.published_for([a, b])] == ["base-4k", "base-64k"]


def test_the_published_differences_are_those_of_the_series() -> None:
    by_label = {item.label: item for item in comparison.PUBLISHED}
    more = by_label["boot-time"].difference("image", by_label["base-4k"])
    assert more is not None and more[0] == 2150 and round(more[1], 1) == 3.9


def test_a_vmlinux_of_another_kernel_is_not_taken(tmp_path: Path) -> None:
    write(tmp_path / "Image", image(1))
    write(tmp_path / "vmlinux", vmlinux().replace(b"6.12.107", b"6.12.108"))
    with pytest.raises(InputError, match="banners differ"):
        comparison.measure(str(tmp_path / "Image"))
