"""``uspace-mm guest root list``: the layers in the cache."""

from __future__ import annotations

import argparse
import json


class Command:
    """Prints the images that are cached, the oldest of each kind first."""

    name = "list"
    help = "List the layers of root file systems in the cache, their sizes and what is in them."

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--json", action="store_true", help="print them as JSON")

    def run(self, args: argparse.Namespace) -> int:
        import time

        from uspace_mm.guest.cache import cache_root
        from uspace_mm.guest.rootfs.describe import all_layers
        from uspace_mm.sizes import format_size

        layers = all_layers()
        if args.json:
            records = {"cache": str(cache_root()), "layers": [layer.as_json() for layer in layers]}
            print(json.dumps(records, indent=1))
            return 0
        if not layers:
            print(f"no root file system in {cache_root()}")
        for layer in layers:
            made = time.strftime("%Y-%m-%d %H:%M", time.localtime(layer.made_s))
            print(f"{layer.kind:9} {format_size(layer.size_bytes):>9}  {made}  {layer.image}")
            for line in layer.lines():
                print(f"{'':9} {line}")
        return 0
