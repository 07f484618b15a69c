"""``uspace-mm guest kernel inspect``: what kernel files say of themselves."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uspace_mm.guest.kernel.inspection import Inspection


class Command:
    """Prints page size, version, packing and sizes of each file."""

    name = "inspect"
    help = "Say which page size, version and sizes a kernel image or vmlinux has."

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="kernel image, or vmlinux")
        parser.add_argument("--json", action="store_true", help="print what was found as JSON")

    def run(self, args: argparse.Namespace) -> int:
        from uspace_mm.guest.kernel.inspection import inspect

        found = [inspect(path) for path in args.images]
        if args.json:
            print(json.dumps({"kernels": [item.as_json() for item in found]}, indent=1))
        else:
            print("\n\n".join(_text(item) for item in found))
        # A header that contradicts the configuration is what `inspect` is asked about.
        return 1 if any(item.contradiction for item in found) else 0


def _text(item: Inspection) -> str:
    from uspace_mm.guest.kernel.sections import DEFINITION
    from uspace_mm.sizes import format_size

    page_size = f"{item.page_size} (from {item.page_size_from})" if item.page_size else item.page_size_from
    rows = [
        ("kind", item.kind if item.packing is None else f"{item.kind}, packed with {item.packing}"),
        ("page size", page_size),
        ("version", item.version),
        ("banner", item.banner),
        ("configuration", "inside (IKCONFIG)" if item.has_config else "not inside"),
        ("file", f"{item.file_bytes} bytes ({format_size(item.file_bytes)})"),
    ]
    if item.packing is not None:
        rows.append(("unpacked", f"{item.kernel_bytes} bytes ({format_size(item.kernel_bytes)})"))
    if item.memory_bytes is not None:
        rows.append(("in memory", f"{item.memory_bytes} bytes, loaded at offset {item.text_offset:#x}"))
    if item.big_endian:
        rows.append(("byte order", "big-endian"))
    if item.sections is not None:
        sizes = item.sections
        rows += [("text", f"{sizes.text_bytes} bytes"), ("data", f"{sizes.data_bytes} bytes")]
        rows += [("bss", f"{sizes.bss_bytes} bytes"), ("by", DEFINITION)]
    if item.contradiction:
        rows.append(("WRONG", item.contradiction))
    return "\n".join([str(item.path), *(f"  {name:<14} {value}" for name, value in rows)])
