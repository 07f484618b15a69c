"""How large a vmlinux is in memory: text, data and bss, by its sections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO

from uspace_mm.errors import InputError

DEFINITION = (
    "text: allocated sections that are executable or read-only; data: allocated, writable, with bytes in the "
    "file; bss: allocated, writable, without (as the Berkeley format of size(1))"
)
_SHF_WRITE = 1
_SHF_ALLOC = 2
_SHF_EXECINSTR = 4
_SECTIONS_LIMIT = 10_000


@dataclass(frozen=True)
class Sections:
    """Sums of section sizes in bytes, by :data:`DEFINITION`."""

    text_bytes: int
    data_bytes: int
    bss_bytes: int


def read_sections(file: IO[bytes], name: object) -> Sections:
    """Add up the sections of the ELF file `file`; raises :class:`InputError` for what is no vmlinux for
    arm64."""
    from elftools.common.exceptions import ELFError
    from elftools.construct.core import ConstructError
    from elftools.elf.elffile import ELFFile

    text = data = bss = 0
    try:
        elf = ELFFile(file)
        if elf.header["e_machine"] != "EM_AARCH64":
            raise InputError(f"{name}: an ELF file for {elf.header['e_machine']}, not for aarch64")
        if elf.num_sections() > _SECTIONS_LIMIT:
            raise InputError(f"{name}: claims to have {elf.num_sections()} sections: damaged, or no kernel")
        for index in range(elf.num_sections()):
            # Not get_section(), which reads names and what each kind of section points to.
            header = elf._get_section_header(index)
            flags, size = header["sh_flags"], header["sh_size"]
            if not flags & _SHF_ALLOC:
                continue
            if flags & _SHF_EXECINSTR or not flags & _SHF_WRITE:
                text += size
            elif header["sh_type"] != "SHT_NOBITS":
                data += size
            else:
                bss += size
    except (ELFError, ConstructError, ValueError, OverflowError, OSError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{name}: an ELF file that cannot be read: {str(error) or type(error).__name__}"
        ) from error
    if text == 0:
        raise InputError(f"{name}: an ELF file without sections in memory: no vmlinux")
    return Sections(text, data, bss)
