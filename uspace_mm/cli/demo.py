"""``uspace-mm demo NAME``: one module ``demo_NAME`` of this package per demonstration."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from uspace_mm.cli import CommandProtocol

# A module of uspace_mm.cli per entry; each has a class `Command`, as the top-level commands do.
DEMOS: tuple[str, ...] = ("demo_postcopy", "demo_pager")


class Command:
    """Chooses the demonstration."""

    name = "demo"
    help = "Show the pager or a postcopy migration at work on real data."

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        subparsers = parser.add_subparsers(dest="demo", metavar="DEMO", required=True)
        for module_name in DEMOS:
            demo = cast("CommandProtocol", import_module(f"uspace_mm.cli.{module_name}").Command())
            sub = subparsers.add_parser(demo.name, help=demo.help, description=demo.help)
            demo.prepare_parser(sub)
            sub.set_defaults(run_demo=demo.run)

    def run(self, args: argparse.Namespace) -> int:
        return int(args.run_demo(args))
