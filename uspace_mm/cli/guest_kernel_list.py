"""``uspace-mm guest kernel list``: the kernels in the cache."""

from __future__ import annotations

import argparse
import json


class Command:
    """Prints what is cached, the oldest first."""

    name = "list"
    help = "List the kernels in the cache, their sizes and where they lie."

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--json", action="store_true", help="print them as JSON")

    def run(self, args: argparse.Namespace) -> int:
        from uspace_mm.guest.cache import cache_root
        from uspace_mm.guest.kernel import own, packaged
        from uspace_mm.sizes import format_size

        built, debian = own.cached(), packaged.cached()
        if args.json:
            others = [
                {
                    "page_size": str(kernel.page_size),
                    "version": kernel.version,
                    "image": str(kernel.image),
                    "modules": [str(module) for module in kernel.modules],
                }
                for kernel in debian
            ]
            records = {
                "cache": str(cache_root()),
                "built": [item.as_json() for item in built],
                "debian": others,
            }
            print(json.dumps(records, indent=1))
            return 0
        if not built and not debian:
            print(f"no kernel in {cache_root()}")
        rows = [
            (item.kernel, "built" if item.current else "built, from other fragments than today's")
            for item in built
        ]
        for kernel, how in [*rows, *((kernel, "Debian's") for kernel in debian)]:
            size = format_size(kernel.image.stat().st_size)
            print(f"{kernel.page_size!s:>4}  Linux {kernel.version}  {size:>9}  {how}  {kernel.image}")
        return 0
