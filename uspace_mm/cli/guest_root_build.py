"""``uspace-mm guest root build``: make the layers of a root file system, or find them in the cache."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


class Command:
    """Makes what is not in the cache, and says which images there are and what is in them."""

    name = "build"
    help = "Make a root file system with Python, numpy, pytest, this package and what you add; it is cached."

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--package",
            action="append",
            default=[],
            metavar="NAME",
            help="a package of Debian, several times",
        )
        parser.add_argument(
            "--wheel", action="append", default=[], type=Path, metavar="FILE", help="a wheel, several times"
        )
        parser.add_argument(
            "--pip", action="append", default=[], metavar="NAME", help="what pip finds by this name"
        )
        parser.add_argument(
            "--overlay",
            action="append",
            default=[],
            type=Path,
            metavar="DIR",
            help="files that land at / of the guest",
        )
        parser.add_argument("--json", action="store_true", help="print the layers as JSON")

    def run(self, args: argparse.Namespace) -> int:
        from uspace_mm.guest import rootfs
        from uspace_mm.guest.progress import on_terminal
        from uspace_mm.guest.rootfs.describe import describe
        from uspace_mm.sizes import format_size

        with on_terminal() as progress:
            root = rootfs.obtain(
                packages=args.package,
                wheels=args.wheel,
                pips=args.pip,
                overlays=args.overlay,
                progress=progress,
            )
        layers = [describe(path) for path in root.layers]
        if args.json:
            agent = {"path": str(root.agent), "size_bytes": root.agent.stat().st_size}
            print(json.dumps({"layers": [layer.as_json() for layer in layers], "agent": agent}, indent=1))
            return 0
        for layer in layers:
            print(f"{layer.kind:9} {format_size(layer.size_bytes):>9}  {layer.image}")
            for line in layer.lines():
                print(f"{'':9} {line}")
        print(f"{'agent':9} {format_size(root.agent.stat().st_size):>9}  {root.agent}")
        return 0
