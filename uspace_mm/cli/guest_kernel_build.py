"""``uspace-mm guest kernel build``: kernels of our own for one or several page sizes."""

from __future__ import annotations

import argparse
import json


class Command:
    """Builds what is not in the cache, and says where each kernel lies and what it lacks."""

    name = "build"
    help = "Build kernels that differ in nothing but the page size; what is cached is not built again."

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--page-size", required=True, metavar="SIZES", help="4k, 16k, 64k, several with commas, or all"
        )
        parser.add_argument(
            "--source",
            metavar="SOURCE",
            help="package of Debian, tarball or folder with the source (default: linux-source-6.12)",
        )
        parser.add_argument("--sha256", metavar="DIGEST", help="refuse a package or tarball with another one")
        parser.add_argument("--update", action="store_true", help="look for a newer version of the package")
        parser.add_argument("--jobs", type=int, metavar="N", help="compilers at once (default: one per CPU)")
        parser.add_argument("--json", action="store_true", help="print the kernels as JSON")

    def run(self, args: argparse.Namespace) -> int:
        from uspace_mm.guest.kernel import build
        from uspace_mm.guest.pagesize import parse_page_sizes
        from uspace_mm.guest.progress import on_terminal

        sizes = parse_page_sizes(args.page_size)
        with on_terminal() as progress:
            built = build(
                sizes,
                source=args.source,
                sha256=args.sha256,
                update=args.update,
                jobs=args.jobs,
                progress=progress,
            )
        if args.json:
            print(json.dumps({"kernels": [item.as_json() for item in built]}, indent=1))
            return 0
        for item in built:
            kernel = item.kernel
            took = f"built in {item.built_s:.0f} s"
            print(f"{kernel.page_size!s:>4}  Linux {kernel.version}  {took}  {kernel.image}")
        for name, why in built[0].missing.items():
            print(f"      without {name}: {why}")
        return 0
