"""``uspace-mm guest root update``: look up anew which packages and wheels there are."""

from __future__ import annotations

import argparse
import json


class Command:
    """Forgets what names meant, so that the next root is made of the newest versions."""

    name = "update"
    help = "Look up which versions of packages and wheels there are now; the next root is made of them."

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--json", action="store_true", help="print what is new as JSON")

    def run(self, args: argparse.Namespace) -> int:
        from uspace_mm.guest import rootfs
        from uspace_mm.guest.progress import on_terminal

        with on_terminal() as progress:
            changes = rootfs.update(progress)
        if args.json:
            print(json.dumps({"changes": [{"was": was, "is": now} for was, now in changes]}, indent=1))
            return 0
        for was, now in changes:
            print(f"{was or 'new':40} -> {now or 'no longer needed'}")
        if not changes:
            print("nothing is newer than what is in the cache")
        return 0
