"""``uspace-mm guest kernel fetch``: Debian's own kernels."""

from __future__ import annotations

import argparse
import json


class Command:
    """Fetches what is not in the cache."""

    name = "fetch"
    help = "Fetch Debian's own kernels with 4K or 16K pages, with the modules that guests need."

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--page-size", required=True, metavar="SIZES", help="4k, 16k, or both with a comma"
        )
        parser.add_argument(
            "--module",
            action="append",
            default=[],
            metavar="NAME",
            help="load this one, too, and what it needs (may be repeated)",
        )
        parser.add_argument("--update", action="store_true", help="look for a newer kernel than today's")
        parser.add_argument("--json", action="store_true", help="print the kernels as JSON")

    def run(self, args: argparse.Namespace) -> int:
        from uspace_mm.guest.kernel import packaged
        from uspace_mm.guest.pagesize import parse_page_sizes
        from uspace_mm.guest.progress import on_terminal

        sizes = parse_page_sizes(args.page_size)
        modules = tuple(dict.fromkeys((*packaged.MODULES, *args.module)))
        with on_terminal() as progress:
            kernels = [
                packaged.fetch(size, modules=modules, update=args.update, progress=progress) for size in sizes
            ]
        if args.json:
            records = [
                {
                    "page_size": str(kernel.page_size),
                    "version": kernel.version,
                    "image": str(kernel.image),
                    "modules": [str(module) for module in kernel.modules],
                    "config": str(kernel.config) if kernel.config else None,
                }
                for kernel in kernels
            ]
            print(json.dumps({"kernels": records}, indent=1))
            return 0
        for kernel in kernels:
            print(f"{kernel.page_size!s:>4}  Linux {kernel.version}  {kernel.image}")
            names = " ".join(module.stem for module in kernel.modules)
            print(f"      modules, in this order: {names or 'none'}")
        return 0
