"""Synthesised ELF files: program headers as a test wants them, and just enough around them to be read."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

R, RX, RW, RWX = 4, 5, 6, 7
PT_LOAD, PT_DYNAMIC, PT_INTERP, PT_RELRO = 1, 2, 3, 0x6474E552
ET_EXEC, ET_DYN = 2, 3
AARCH64, X86_64 = 183, 62


@dataclass(frozen=True)
class Ph:
    """One program header; what is not given follows from the rest."""

    vaddr: int
    offset: int | None = None
    size: int = 0x800
    memsz: int | None = None
    flags: int = R
    align: int = 0x10000
    kind: int = PT_LOAD

    def pack(self) -> bytes:
        offset = self.vaddr if self.offset is None else self.offset
        memsz = self.size if self.memsz is None else self.memsz
        return struct.pack(
            "<IIQQQQQQ", self.kind, self.flags, offset, self.vaddr, self.vaddr, self.size, memsz, self.align
        )


def relro(start: int, end: int) -> Ph:
    """PT_GNU_RELRO from `start` to `end`."""
    return Ph(start, size=end - start, kind=PT_RELRO, align=1)


def elf(
    headers: Sequence[Ph],
    *,
    needed: Sequence[str] = ("libc.so.6",),
    soname: str | None = None,
    interp: str | None = None,
    kind: int = ET_DYN,
    machine: int = AARCH64,
    pie: bool = False,
    dynamic: bool = True,
    size: int | None = None,
    text: bytes = b"",
    text_at: int = 0x700,
) -> bytes:
    """An ELF file with `headers`; what it refers to lies in the first 0x800 bytes.

    The first LOAD should begin at offset 0 with at least 0x800 bytes, so that they are mapped.
    """
    first = next((ph for ph in headers if ph.kind == PT_LOAD), Ph(0))
    bias = max(first.vaddr - (first.vaddr if first.offset is None else first.offset), 0)
    strings = b"\0"
    entries = []
    for tag, names in ((1, needed), (14, [soname] if soname else [])):
        for name in names:
            entries.append((tag, len(strings)))
            strings += name.encode() + b"\0"
    if pie:
        entries.append((0x6FFFFFFB, 0x08000000))
    extra: list[Ph] = []
    blob = bytearray(0x800)
    place = 0x400
    if interp:
        raw = interp.encode() + b"\0"
        blob[place : place + len(raw)] = raw
        extra.append(Ph(place + bias, place, len(raw), kind=PT_INTERP))
        place += len(raw)
    if dynamic:
        blob[place : place + len(strings)] = strings
        entries += [(5, place + bias), (10, len(strings)), (0, 0)]
        place += len(strings) + -len(strings) % 8
        raw = b"".join(struct.pack("<QQ", *entry) for entry in entries)
        blob[place : place + len(raw)] = raw
        extra.append(Ph(place + bias, place, len(raw), kind=PT_DYNAMIC))
    everything = [*headers, *extra]
    header = b"\x7fELF\2\1\1" + bytes(9)
    header += struct.pack(
        "<HHIQQQIHHHHHH", kind, machine, 1, first.vaddr, 64, 0, 0, 64, 56, len(everything), 64, 0, 0
    )
    table = header + b"".join(ph.pack() for ph in everything)
    blob[: len(table)] = table
    blob[text_at : text_at + len(text)] = text
    ends = [(ph.vaddr if ph.offset is None else ph.offset) + ph.size for ph in headers if ph.kind == PT_LOAD]
    total = max([0x800, *ends]) if size is None else size
    return bytes(blob[:total]) + bytes(max(total - len(blob), 0))
