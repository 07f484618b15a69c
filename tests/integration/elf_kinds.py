"""ELF files of every kind that the rules tell apart, linked with the cross linker."""

from __future__ import annotations

import struct
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

PREFIX = "aarch64-linux-gnu-"

# Code, read-only data, written data with and without relocations, zeros: something for each segment to get
# wrong.
SOURCE = """
const char text[600] = {[0 ... 599] = 'r'};
int data[300] = {[0 ... 299] = 7};
const char *const relocated[8] = {text, text + 1, text + 2, text + 3, text + 4, text + 5, text + 6, text + 7};
int zeros[300];
int sum(int n)
{
	int all = 0;
	for (int i = 0; i < n; i++)
		all += data[i] + zeros[i] + relocated[i & 7][0] + text[i];
	return all;
}
__attribute__((noreturn)) void _start(void)
{
	register long status __asm__("x0") = 0, number __asm__("x8") = 93;
	__asm__ volatile("svc #0" : : "r"(status), "r"(number));
	__builtin_trap();
}
"""

SCRIPT = """
PHDRS {{
	{phdr_header}
	first PT_LOAD FILEHDR PHDRS FLAGS({first});
	{code_header}
	data PT_LOAD FLAGS(6);
	{extra_header}
	{late_code_header}
	dynamic PT_DYNAMIC FLAGS(6);
	{interp_header}
	stack PT_GNU_STACK FLAGS(6);
	relro 0x6fff0000 FLAGS(4);
}}
SECTIONS {{
	. = SIZEOF_HEADERS;
	.interp : {{ *(.interp) }} :first {interp}
	.hash : {{ *(.hash) }} :first
	.gnu.hash : {{ *(.gnu.hash) }}
	.dynsym : {{ *(.dynsym) }}
	.dynstr : {{ *(.dynstr) }}
	.rela.dyn : {{ *(.rela.*) }}
	{text}
	.rodata : {{ *(.rodata*) }}
	{code_section}
	. = {data};
	.dynamic : {{ *(.dynamic) }} :data :dynamic :relro
	.data.rel.ro : {{ *(.data.rel.ro*) *(.got*) }} :data :relro
	. = {written};
	.data : {{ *(.data*) }} :data
	. = {bss};
	.bss : {{ *(.bss*) *(COMMON) }} :{bss_segment}
	{extra}
	{late_code_section}
	/DISCARD/ : {{ *(.note*) *(.comment) *(.eh_frame*) }}
}}
"""


@dataclass(frozen=True)
class Layout:
    """Where the parts of a file lie. ``relro`` replaces the range of PT_GNU_RELRO, None takes it away."""

    name: str
    text: int | None = None  # of the read-only data in the first segment
    code: int = 0x10000
    data: int = 0x20000
    written: int = 0x30000
    bss: int = 0x30800
    first: int = 4
    code_in_first: bool = False
    code_last: bool = False
    extra: int | None = None  # one more written LOAD, at this address, as patchelf adds them
    max_page: int = 0x10000
    align: int | None = None  # replaces p_align
    relro: tuple[int, int] | None = (0x20000, 0x30000)


GOOD = Layout("good")
LAYOUTS: tuple[Layout, ...] = (
    GOOD,
    replace(GOOD, name="no-relro", relro=None),
    # Congruence: the linker keeps file offsets congruent to a smaller page only.
    replace(
        GOOD, name="linked-for-16k", max_page=0x4000, data=0x24000, written=0x2C000, bss=0x2C800, relro=None
    ),
    replace(
        GOOD,
        name="linked-for-4k",
        max_page=0x1000,
        code=0x3000,
        data=0x6000,
        written=0x9000,
        bss=0x9800,
        relro=None,
    ),
    replace(GOOD, name="patchelf", max_page=0x1000, extra=0x45000),
    # Alignment only: p_align is small, everything else as it should be.
    replace(GOOD, name="align-4k", align=0x1000),
    replace(GOOD, name="align-16k", align=0x4000),
    # Overlap, with file offsets that are congruent.
    replace(GOOD, name="data-after-read-only", code_in_first=True, first=5, data=0x20000, relro=None),
    replace(
        GOOD,
        name="read-only-then-written",
        code=0x40000,
        code_last=True,
        data=0x2000,
        written=0x2800,
        bss=0x3000,
        relro=None,
    ),
    # Read-only data in the page of written data: musl gives that part of an executable to malloc.
    replace(
        GOOD,
        name="read-only-and-written-in-one-page",
        text=0x2400,
        code=0x40000,
        code_last=True,
        data=0x2900,
        written=0x2C00,
        bss=0x3400,
        relro=None,
    ),
    replace(
        GOOD, name="code-then-written", code=0x10000, data=0x13000, written=0x13800, bss=0x14000, relro=None
    ),
    replace(
        GOOD,
        name="code-then-written-16k",
        code=0x10000,
        data=0x14000,
        written=0x14800,
        bss=0x15000,
        relro=None,
    ),
    replace(
        GOOD, name="read-only-then-code", code=0x2000, data=0x20000, written=0x20800, bss=0x21000, relro=None
    ),
    replace(
        GOOD,
        name="read-only-then-code-16k",
        code=0x4000,
        data=0x20000,
        written=0x20800,
        bss=0x21000,
        relro=None,
    ),
    # RELRO.
    replace(GOOD, name="relro-end-inside", relro=(0x20000, 0x2F000)),
    replace(GOOD, name="relro-end-inside-16k", relro=(0x20000, 0x2C000)),
    replace(GOOD, name="relro-in-one-page", relro=(0x20000, 0x20400)),
    replace(GOOD, name="relro-start-inside", relro=(0x24000, 0x30000)),
    replace(GOOD, name="relro-start-inside-4k", relro=(0x21000, 0x30000)),
    replace(GOOD, name="relro-past-the-end", relro=(0x20000, 0x80000)),
)


def build(layout: Layout, folder: Path, *, interp: str | None = None, soname: str = "libc.so.6") -> Path:
    """Link `layout`: a shared object that needs nothing, with `interp` an executable that needs `soname`."""
    kind = "exe" if interp else "so"
    path = folder / f"{layout.name}.{kind}"
    source, script = folder / "kinds.c", folder / f"{layout.name}.{kind}.ld"
    extra = ""
    if layout.extra is not None:
        extra = f". = {layout.extra:#x}; .patched : {{ LONG(0x12345678) . += 0x300; }} :extra"
    header = "code PT_LOAD FLAGS(5);"
    place, segment = (".", "first") if layout.code_in_first else (f"{layout.code:#x}", "code")
    section = f". = {place}; .text : {{ *(.text*) }} :{segment}"
    script.write_text(
        SCRIPT.format(
            first=layout.first,
            text=f". = {layout.text:#x};" if layout.text else "",
            code_header="" if layout.code_in_first or layout.code_last else header,
            late_code_header=header if layout.code_last else "",
            code_section="" if layout.code_last else section,
            late_code_section=section if layout.code_last else "",
            data=f"{layout.data:#x}",
            written=f"{layout.written:#x}",
            bss=f"{layout.bss:#x}",
            bss_segment="data",
            extra_header="extra PT_LOAD FLAGS(6);" if layout.extra is not None else "",
            extra=extra,
            interp_header="interp PT_INTERP;" if interp else "",
            phdr_header="phdr PT_PHDR PHDRS;" if interp else "",  # the loader finds the program by it
            interp=":interp" if interp else "",
        )
    )
    code = folder / "kinds.o"
    if not code.exists():
        source.write_text(SOURCE)
        _run([f"{PREFIX}gcc", "-w", "-O1", "-fPIC", "-ffreestanding", "-c", str(source), "-o", str(code)])
    command = [f"{PREFIX}ld", str(code), "-T", str(script)]
    command += ["-o", str(path), "-z", f"max-page-size={layout.max_page:#x}", "-z", "common-page-size=0x1000"]
    command += ["--hash-style=both", "--build-id=none", "--no-warn-rwx-segments"]
    if interp:
        stub = folder / f"stub-{soname}"
        if not stub.exists():
            _run([f"{PREFIX}ld", "-shared", "-soname", soname, "-o", str(stub), str(code)])
        command += ["-pie", "-e", "_start", f"--dynamic-linker={interp}", "--no-as-needed", str(stub)]
    else:
        command += ["-shared", "-e", "0"]
    _run(command)
    _patch(path, layout)
    return path


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _patch(path: Path, layout: Layout) -> None:
    data = bytearray(path.read_bytes())
    (table,) = struct.unpack_from("<Q", data, 32)
    (count,) = struct.unpack_from("<H", data, 56)
    for at in range(table, table + 56 * count, 56):
        (kind,) = struct.unpack_from("<I", data, at)
        if kind == 1 and layout.align is not None:
            struct.pack_into("<Q", data, at + 48, layout.align)
        if kind == 0x6FFF0000:  # a place for PT_GNU_RELRO: the linker would check that one
            start, end = layout.relro or (0, 0)
            struct.pack_into("<II", data, at, 0x6474E552 if layout.relro else 0, 4)
            struct.pack_into("<QQQQQ", data, at + 8, start, start, start, end - start, end - start)
    path.write_bytes(data)
