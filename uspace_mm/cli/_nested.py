"""A command that consists of commands: one module of this package for each of them."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from uspace_mm.cli import CommandProtocol


class Nested:
    """Base of ``demo``, ``guest``, ``elf`` and their like: chooses one of ``modules`` by its name."""

    name: str
    help: str
    metavar = "COMMAND"
    # A module of uspace_mm.cli per entry; each has a class `Command`, as the top-level commands do.
    modules: tuple[str, ...]

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        key = f"{self.name}_command"
        subparsers = parser.add_subparsers(dest=key, metavar=self.metavar, required=True)
        for module_name in self.modules:
            nested = cast("CommandProtocol", import_module(f"uspace_mm.cli.{module_name}").Command())
            sub = subparsers.add_parser(nested.name, help=nested.help, description=nested.help)
            nested.prepare_parser(sub)
            sub.set_defaults(**{f"run_{self.name}": nested.run})

    def run(self, args: argparse.Namespace) -> int:
        return int(getattr(args, f"run_{self.name}")(args))
