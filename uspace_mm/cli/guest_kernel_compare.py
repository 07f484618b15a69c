"""``uspace-mm guest kernel compare``: the size table of the boot-time page size series for kernels at
hand."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from string import ascii_uppercase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uspace_mm.guest.kernel.comparison import Measured


class Command:
    """Prints sizes and differences beside the published ones."""

    name = "compare"
    help = (
        "Compare image, text and data sizes of kernels, beside the figures of the boot-time page size series."
    )

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "kernels",
            nargs="+",
            metavar="KERNEL",
            help="image, vmlinux, or page size of a cached kernel; the others are compared with the first",
        )
        parser.add_argument("--json", action="store_true", help="print the tables as JSON")

    def run(self, args: argparse.Namespace) -> int:
        from uspace_mm.errors import InputError
        from uspace_mm.guest.kernel import comparison
        from uspace_mm.guest.kernel.sections import DEFINITION

        if not 2 <= len(args.kernels) <= 8:
            raise InputError(f"{len(args.kernels)} kernels: from two to eight can be compared")
        ours = [comparison.measure(name) for name in args.kernels]
        theirs = comparison.published_for(ours)
        if args.json:
            tables = {"kernels": ours, "published": theirs, "all_published": comparison.PUBLISHED}
            records = {name: [_record(item, table[0]) for item in table] for name, table in tables.items()}
            print(json.dumps({**records, "definition": DEFINITION}, indent=1))
            return 0
        for letter, item in zip(ascii_uppercase, ours, strict=False):
            print(f"{letter}: {item.label}, Linux {item.version}")
        headings = [
            f"{letter} {item.page_size or 'boot-time'}"
            for letter, item in zip(ascii_uppercase, ours, strict=False)
        ]
        print()
        print(_table("these kernels, KB (1024 bytes)", headings, ours))
        print()
        print(_table("published for these page sizes, KB", [item.label for item in theirs], theirs))
        if len({item.version for item in ours}) > 1:
            versions = ", ".join(item.version for item in ours)
            print(f"\nNot one source: {versions}. The differences are not those of the page size alone.")
        print(f"\nimage: bytes of the unpacked image; {DEFINITION}.")
        print("The published text and data are of a vmlinux with a full configuration; look at the percents.")
        return 0


def _record(item: Measured, base: Measured) -> dict[str, object]:
    from uspace_mm.guest.kernel.comparison import MEASURES

    differences = {
        measure: {"kb": found[0], "percent": found[1]}
        for measure in MEASURES
        if (found := item.difference(measure, base)) is not None
    }
    return {
        "label": item.label,
        "page_size": str(item.page_size) if item.page_size else None,
        "version": item.version,
        "kb": item.kb,
        "difference": differences,
    }


def _table(title: str, headings: Sequence[str], columns: Sequence[Measured]) -> str:
    from uspace_mm.guest.kernel.comparison import MEASURES

    lines = [f"{title:<36}" + "".join(f"{heading:>24}" for heading in headings)]
    for measure in MEASURES:
        cells = [f"{columns[0].kb[measure]:.0f}" if measure in columns[0].kb else "not known"]
        for item in columns[1:]:
            found = item.difference(measure, columns[0])
            if found is None:
                cells.append(f"{item.kb[measure]:.0f}" if measure in item.kb else "not known")
            else:
                cells.append(f"{item.kb[measure]:.0f} ({found[0]:+.0f}, {found[1]:+.1f} %)")
        lines.append(f"{measure:<36}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)
