"""``uspace-mm guest cache``: what the cache of kernels, packages and root file systems holds."""

from __future__ import annotations

import argparse
import json


class Command:
    """Prints the cache's kinds of entries with their sizes, or empties it."""

    name = "cache"
    help = "Show what the cache of guests holds and how large it is, or empty it."

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--clear", action="store_true", help="remove everything, unless somebody uses it now"
        )
        parser.add_argument(
            "--unused", type=float, metavar="DAYS", help="with --clear: only what was not used for so long"
        )
        parser.add_argument("--json", action="store_true", help="print it as JSON")

    def run(self, args: argparse.Namespace) -> int:
        from uspace_mm.errors import InputError
        from uspace_mm.guest import stored
        from uspace_mm.guest.cache import cache_root
        from uspace_mm.sizes import format_size

        if args.unused is not None and not (args.clear and args.unused >= 0):
            raise InputError("--unused DAYS: a number of days, together with --clear")
        if args.clear:
            removed = stored.clear() if args.unused is None else stored.clear_unused(args.unused * 86400)
            if args.json:
                print(json.dumps({"cache": str(cache_root()), "removed_bytes": removed}))
            else:
                print(f"removed {format_size(removed)} from {cache_root()}")
            return 0
        entries, work = stored.entries(), stored.work_bytes()
        total = work + sum(entry.size_bytes for entry in entries)
        if args.json:
            records = [
                {
                    "kind": entry.kind,
                    "folder": str(entry.folder),
                    "size_bytes": entry.size_bytes,
                    "made_s": entry.made_s,
                }
                for entry in entries
            ]
            print(
                json.dumps({"cache": str(cache_root()), "total_bytes": total, "entries": records}, indent=1)
            )
            return 0
        for kind in dict.fromkeys(entry.kind for entry in entries):
            sizes = [entry.size_bytes for entry in entries if entry.kind == kind]
            print(f"{kind:16} {len(sizes):5}  {format_size(sum(sizes)):>10}")
        print(f"{'lists and names':16} {'':5}  {format_size(work):>10}")
        print(f"{'all':16} {len(entries):5}  {format_size(total):>10}  {cache_root()}")
        return 0
