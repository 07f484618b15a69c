"""The ``uspace-mm`` command: one file per subcommand, one place that turns errors into exit statuses."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, cast

from uspace_mm import __version__
from uspace_mm.errors import UspaceError

# A module of uspace_mm.cli per entry; each has a class `Command`.
COMMANDS = ("doctor", "demo", "notify", "bench", "guest", "elf")


class CommandProtocol(Protocol):
    """What a module of this package offers as ``Command``."""

    name: str
    help: str

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


def _build_parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uspace-mm", description="Memory management in user space, on the running kernel."
    )
    parser.add_argument("--version", action="version", version=f"uspace-mm {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    # The modules of the other commands are not imported: a start costs what the command itself needs.
    for module_name in argv[:1] if argv and argv[0] in COMMANDS else COMMANDS:
        module = import_module(f"uspace_mm.cli.{module_name}")
        command = cast(CommandProtocol, module.Command())
        sub = subparsers.add_parser(command.name, help=command.help, description=command.help)
        command.prepare_parser(sub)
        sub.set_defaults(run=command.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns 0 done, 1 not so, 2 bad input, 3 this machine cannot, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    name = f"uspace-mm {argv[0]}" if argv and argv[0] in COMMANDS else "uspace-mm"
    try:
        args = _build_parser(argv).parse_args(argv)
        status = int(args.run(args))
        sys.stdout.flush()
        return status
    except UspaceError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe went away (`| head`): not an error, and nothing more can be printed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
