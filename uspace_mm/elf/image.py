"""Reads the few headers of an ELF file that decide how it is mapped (gABI chapters 4 and 5, elf(5)).

Own parsing of fixed structures: a hostile file may lie about every count and offset, so each read has a
bound that does not come from the file, and nothing but the program headers has to be readable.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from uspace_mm.elf.records import MACHINES, Image, Kind, Libc, Segment
from uspace_mm.elf.source import Source

MAGIC = b"\x7fELF"
ET_REL, ET_EXEC, ET_DYN, ET_CORE = 1, 2, 3, 4
PT_LOAD, PT_DYNAMIC, PT_INTERP, PT_NOTE, PT_GNU_RELRO = 1, 2, 3, 4, 0x6474E552
DT_NEEDED, DT_STRTAB, DT_STRSZ, DT_SONAME, DT_FLAGS_1 = 1, 5, 10, 14, 0x6FFFFFFB
DF_1_PIE = 0x08000000

# The kernel takes a table of 64 KiB at most (load_elf_phdrs); honest files have about ten entries.
MAX_PROGRAM_HEADERS = 1170
MAX_LOADS = 128
MAX_DYNAMIC_BYTES = 1 << 20
MAX_NEEDED = 1000
MAX_STRING = 1024
MAX_NOTE_BYTES = 1 << 16


class ElfError(Exception):
    """The headers cannot be read; the text says what is wrong with them."""


class NotLoadableError(Exception):
    """An ELF file that nobody maps: object file, kernel module, core dump, separate debug information."""


@dataclass(frozen=True, slots=True)
class _Layout:
    header: struct.Struct
    program_header: struct.Struct
    dynamic: struct.Struct


_FIELDS = {64: ("HHIQQQIHHHHHH", "IIQQQQQQ", "qQ"), 32: ("HHIIIIIHHHHHH", "IIIIIIII", "iI")}
_LAYOUTS = {
    (bits, order): _Layout(*(struct.Struct(order + text) for text in fields))
    for bits, fields in _FIELDS.items()
    for order in "<>"
}


def machine_of(source: Source) -> str | None:
    """The machine that the file is for, None when its first bytes are no ELF header. Reads 20 bytes."""
    head = source.read_at(0, 20)
    if len(head) < 20 or not head.startswith(MAGIC) or head[5] not in (1, 2):
        return None
    (number,) = struct.unpack_from("<H" if head[5] == 1 else ">H", head, 18)
    return MACHINES.get(number, f"machine {number}")


def read_image(source: Source, hint: Libc = Libc.UNKNOWN) -> Image:
    """The image of the ELF file in `source`; `hint` is the libc it is thought to be for when it does not say.

    Raises :class:`ElfError` for headers that no loader takes, :class:`NotLoadableError` for files that are
    not meant to be mapped.
    """
    ident = source.read_at(0, 16)
    if not ident.startswith(MAGIC):
        raise ElfError("no ELF header")
    if len(ident) < 16:
        raise ElfError(f"truncated: the file ends after {source.size} bytes, within the ELF header")
    if ident[4] not in (1, 2) or ident[5] not in (1, 2):
        raise ElfError(f"ELF class {ident[4]} and byte order {ident[5]}: both are 1 or 2 in a valid file")
    bits = 64 if ident[4] == 2 else 32
    layout = _LAYOUTS[bits, "<" if ident[5] == 1 else ">"]
    raw = source.read_at(16, layout.header.size)
    if len(raw) < layout.header.size:
        raise ElfError(f"truncated: the file ends after {source.size} bytes, within the ELF header")
    elf_type, machine, _, entry, phoff, _, _, _, phentsize, phnum, *_ = layout.header.unpack(raw)
    if elf_type in (ET_REL, ET_CORE):
        raise NotLoadableError("object file" if elf_type == ET_REL else "core dump")
    if elf_type not in (ET_EXEC, ET_DYN):
        raise ElfError(f"ELF type {elf_type}: neither an executable (2) nor a shared object (3)")

    headers = _program_headers(source, layout, phoff, phentsize, phnum, bits)
    loads = tuple(segment for kind, segment in headers if kind == PT_LOAD)
    if not loads:
        raise ElfError("no LOAD segment: there is nothing to map")
    if len(loads) > MAX_LOADS:
        raise ElfError(f"{len(loads)} LOAD segments: more than {MAX_LOADS}, which no linker writes")
    first: dict[int, Segment] = {}
    for kind, segment in headers:
        first.setdefault(kind, segment)
    dynamic = first.get(PT_DYNAMIC)
    if dynamic and dynamic.filesz == 0 and dynamic.memsz:
        # glibc's loader knows them by the same sign (elf/dl-load.c, empty_dynamic).
        raise NotLoadableError("separate debug information")

    damage: list[str] = []
    interp = None
    if PT_INTERP in first:
        interp = _string(source, first[PT_INTERP].offset, first[PT_INTERP].filesz)
        if interp is None:
            damage.append("the interpreter's name cannot be read")
    strings = _dynamic(source, layout, dynamic, loads, damage) if dynamic else _Dynamic()
    loaded_as = _kind(elf_type, interp, strings, dynamic is not None)
    # The last of several counts for the loaders; there is never more than one in practice.
    relro = next((segment for kind_, segment in reversed(headers) if kind_ == PT_GNU_RELRO), None)
    android = any(
        b"Android\0" in source.read_at(segment.offset, min(segment.filesz, MAX_NOTE_BYTES))
        for kind_, segment in headers[:64]
        if kind_ == PT_NOTE
    )
    return Image(
        size=source.size,
        bits=bits,
        little_endian=ident[5] == 1,
        machine=MACHINES.get(machine, f"machine {machine}"),
        elf_type=elf_type,
        entry=entry,
        loads=loads,
        relro=relro,
        interp=interp,
        needed=strings.needed,
        soname=strings.soname,
        kind=loaded_as,
        libc=_libc(interp, strings, android, hint),
        damage=tuple(damage),
    )


def _program_headers(
    source: Source, layout: _Layout, phoff: int, phentsize: int, phnum: int, bits: int
) -> list[tuple[int, Segment]]:
    item = layout.program_header
    if phnum == 0:
        raise ElfError("no program headers: there is nothing to map")
    if phentsize != item.size:
        raise ElfError(f"program headers of {phentsize} bytes each, a {bits}-bit file has {item.size}")
    if phnum > MAX_PROGRAM_HEADERS:
        raise ElfError(f"claims {phnum} program headers, the kernel takes {MAX_PROGRAM_HEADERS} at most")
    table = source.read_at(phoff, phnum * item.size)
    if len(table) < phnum * item.size:
        raise ElfError(
            f"truncated: {phnum} program headers at {phoff:#x} go past the file's end at {source.size:#x}"
        )
    found = []
    for index, values in enumerate(item.iter_unpack(table)):
        if bits == 64:
            kind, flags, offset, vaddr, _, filesz, memsz, align = values
        else:
            kind, offset, vaddr, _, filesz, memsz, flags, align = values
        found.append((kind, Segment(index, offset, vaddr, filesz, memsz, flags & 7, align)))
    return found


@dataclass(frozen=True, slots=True)
class _Dynamic:
    needed: tuple[str, ...] = ()
    soname: str | None = None
    pie: bool = False


def _dynamic(
    source: Source, layout: _Layout, segment: Segment, loads: tuple[Segment, ...], damage: list[str]
) -> _Dynamic:
    raw = source.read_at(segment.offset, min(segment.filesz, MAX_DYNAMIC_BYTES))
    raw = raw[: len(raw) - len(raw) % layout.dynamic.size]
    values: dict[int, int] = {}
    needed: list[int] = []
    for tag, value in layout.dynamic.iter_unpack(raw):
        if tag == 0:
            break
        if tag == DT_NEEDED:
            needed.append(value)
        else:
            values.setdefault(tag & 0xFFFFFFFF, value)
    table = next(
        (
            load.offset + values[DT_STRTAB] - load.vaddr
            for load in loads
            if DT_STRTAB in values and load.vaddr <= values[DT_STRTAB] < load.file_end
        ),
        None,
    )
    size = values.get(DT_STRSZ, 0)

    def text(position: int) -> str | None:
        if table is None or not 0 <= position < size:
            return None
        return _string(source, table + position, size - position)

    names = [text(position) for position in needed[:MAX_NEEDED]]
    if not raw or None in names:
        damage.append("the dynamic section or its strings cannot be read")
    return _Dynamic(
        needed=tuple(name for name in names if name),
        soname=text(values[DT_SONAME]) if DT_SONAME in values else None,
        pie=bool(values.get(DT_FLAGS_1, 0) & DF_1_PIE),
    )


def _string(source: Source, offset: int, length: int) -> str | None:
    text, end, _ = source.read_at(offset, min(length, MAX_STRING)).partition(b"\0")
    return text.decode("utf-8", "replace") if end else None


def _kind(elf_type: int, interp: str | None, dynamic: _Dynamic, has_dynamic: bool) -> Kind:
    if elf_type == ET_EXEC or dynamic.pie or not has_dynamic:
        return Kind.EXECUTABLE
    # The loader itself has no interpreter and is mapped by the kernel; libc.so.6 has one and is both.
    is_loader = (dynamic.soname or "").startswith(("ld-linux", "ld.so", "ld64", "libc.musl", "ld-musl"))
    if interp:
        return Kind.BOTH if dynamic.soname else Kind.EXECUTABLE
    return Kind.BOTH if is_loader else Kind.LIBRARY


def _libc(interp: str | None, dynamic: _Dynamic, android: bool, hint: Libc) -> Libc:
    if interp:
        name = interp.rpartition("/")[2]
        if name.startswith("ld-musl"):
            return Libc.MUSL
        if name.startswith("linker"):
            return Libc.BIONIC
        if name.startswith(("ld-linux", "ld64", "ld.so", "ld-2")):
            return Libc.GLIBC
    names = (*dynamic.needed, dynamic.soname or "")
    if any(name.startswith(("libc.musl", "ld-musl")) for name in names):
        return Libc.MUSL
    if any(name.startswith(("libc.so.6", "libm.so.6", "libpthread.so.0", "ld-linux")) for name in names):
        return Libc.GLIBC
    if android:
        return Libc.BIONIC
    if "libc.so" in names:
        return Libc.BIONIC if {"libdl.so", "libm.so", "liblog.so"} & set(names) else Libc.MUSL
    return hint
