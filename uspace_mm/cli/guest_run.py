"""``uspace-mm guest run``: one command in a guest with the page size asked for."""

from __future__ import annotations

import argparse
import json
import os
import stat
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uspace_mm.errors import InputError, UspaceError
from uspace_mm.guest.pagesize import parse_page_size
from uspace_mm.guest.progress import on_terminal
from uspace_mm.sizes import parse_size

if TYPE_CHECKING:
    from uspace_mm.cli._streams import Collected
    from uspace_mm.guest.boot import Guest
    from uspace_mm.guest.outcome import Outcome

_LEAST_MEMORY = 128 << 20
_MOST_CPUS = 64
_SHELL = ["/bin/sh", "-i"]


class Command:
    """Boots, runs, and ends with the command's status."""

    name = "run"
    help = "Run a command in a guest with 4K, 16K or 64K pages; its exit status is ours."

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        parser.usage = "%(prog)s --page-size 4k|16k|64k [options] -- COMMAND..."
        parser.epilog = (
            "Exit status: the command's; 124 timed out, 125 the guest ended otherwise, 126 or 127 it could "
            "not be started, 128 and its number when a signal killed it."
        )
        parser.add_argument("--page-size", required=True, metavar="SIZE", help="4k, 16k or 64k")
        add_machine_options(parser)
        parser.add_argument(
            "--timeout", default="5m", metavar="TIME", help="for the command, e.g. 90s, 5m (default)"
        )
        add_root_options(parser)
        parser.add_argument(
            "--env", action="append", default=[], metavar="NAME=VALUE", help="for the command"
        )
        parser.add_argument("--cwd", default="/", metavar="DIR", help="where the command starts (default /)")
        parser.add_argument(
            "--copy-out", action="append", default=[], metavar="GLOB", help="files to bring back afterwards"
        )
        parser.add_argument("--copy-to", default=".", metavar="DIR", help="where they go (default: here)")
        parser.add_argument(
            "--fresh", action="store_true", help="boot, where otherwise a state saved after a boot is resumed"
        )
        parser.add_argument("--interactive", action="store_true", help="on this terminal; default: a shell")
        parser.add_argument("--json", action="store_true", help="print the outcome and the output as JSON")
        parser.add_argument("argv", nargs="*", metavar="COMMAND", help="the command and its arguments")

    def run(self, args: argparse.Namespace) -> int:
        # Not above: every nested command's parser is built at each start.
        from uspace_mm.cli._signals import termination_raises
        from uspace_mm.guest.boot import GuestError
        from uspace_mm.guest.testing.times import parse_time

        if args.interactive and (args.json or not (sys.stdin.isatty() and sys.stdout.isatty())):
            raise InputError("--interactive: needs a terminal for input and output, and no --json")
        argv = args.argv or (_SHELL if args.interactive else [])
        if not argv:
            raise InputError("no command given: write it after --, e.g. -- getconf PAGESIZE")
        env = _environment(args.env)
        timeout_s = None if args.interactive else parse_time("--timeout", args.timeout)
        started = time.monotonic()
        with termination_raises():
            try:
                with _boot(args) as guest:
                    booted_s = time.monotonic() - started
                    outcome, output = _run(args, guest, argv, env, timeout_s)
                    ended_s = time.monotonic() - started
                    files, lost = _copy_out(args, guest, outcome)
                console, page_bytes = guest.console, guest.hello.page_size
            except GuestError as error:
                return _report(args, error.outcome, console=error.console)
        times = {"boot_s": booted_s, "command_s": ended_s - booted_s}
        status = _report(
            args, outcome, console=console, output=output, files=files, times=times, pages=page_bytes
        )
        if lost is None:
            return status
        print(f"uspace-mm guest run: {lost}", file=sys.stderr)
        return status or lost.exit_status


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which machine and kernel a guest has."""
    parser.add_argument("--memory", default="1G", metavar="SIZE", help="of the guest (default 1G)")
    parser.add_argument("--cpus", type=int, default=2, metavar="N", help="of the guest (default 2)")
    parser.add_argument("--cpu", metavar="MODEL", help="of QEMU (default: the fastest with that page size)")
    parser.add_argument(
        "--kernel", default="built", metavar="IMAGE", help="an image, `built` (our own, default) or `debian`"
    )


def add_root_options(parser: argparse.ArgumentParser) -> None:
    """The options that add to a guest's root file system."""
    parser.add_argument(
        "--overlay", action="append", default=[], metavar="DIR", help="its files are added at /"
    )
    parser.add_argument("--wheel", action="append", default=[], metavar="FILE", help="installed in the guest")
    parser.add_argument(
        "--pip", action="append", default=[], metavar="NAME", help="found and installed by pip"
    )


def _boot(args: argparse.Namespace) -> Guest:
    from uspace_mm.guest.boot import Machine, ready

    memory = parse_size(args.memory)
    if memory < _LEAST_MEMORY:
        raise InputError(f"--memory {args.memory}: a guest needs {_LEAST_MEMORY >> 20}M at least")
    if not 1 <= args.cpus <= _MOST_CPUS:
        raise InputError(f"--cpus {args.cpus}: expected 1 to {_MOST_CPUS}")
    with on_terminal() as progress:
        return ready(
            parse_page_size(args.page_size),
            machine=Machine(memory, args.cpus, args.cpu),
            kernel=args.kernel,
            wheels=[Path(name) for name in args.wheel],
            pips=args.pip,
            overlays=[Path(name) for name in args.overlay],
            # Files that are added change often, and each state takes its place on the disk.
            saved=not args.fresh and not args.overlay,
            progress=progress,
        )


def _run(
    args: argparse.Namespace, guest: Guest, argv: list[str], env: dict[str, str], timeout_s: float | None
) -> tuple[Outcome, Collected | None]:
    from uspace_mm.cli import _streams

    if args.interactive:
        with _streams.raw_terminal(guest.nudge) as terminal:
            env = {"TERM": os.environ.get("TERM", "dumb")} | env
            return guest.run(
                argv,
                cwd=args.cwd,
                env=env,
                stdin=sys.stdin.fileno(),
                on_stdout=_streams.writer(sys.stdout.fileno()),
                terminal=True,
                resized=terminal.resized,
            ), None
    collected = _streams.Collected() if args.json else None
    deadline = None if timeout_s is None else _streams.Deadline(timeout_s)
    outcome = guest.run(
        argv,
        cwd=args.cwd,
        env=env,
        stdin=_stdin(),
        on_stdout=collected.out.add if collected else _streams.writer(sys.stdout.fileno(), deadline),
        on_stderr=collected.err.add if collected else _streams.writer(sys.stderr.fileno(), deadline),
        timeout_s=timeout_s,
    )
    return outcome, collected


def _copy_out(
    args: argparse.Namespace, guest: Guest, outcome: Outcome
) -> tuple[list[Path], UspaceError | None]:
    """The files that came back, and why one did not: how the command ended is told all the same."""
    if not args.copy_out or _is_gone(outcome):
        return [], None
    try:
        files = guest.copy_out(args.copy_out, Path(args.copy_to))
    except UspaceError as error:
        return [], error
    except OSError as error:
        return [], InputError(f"--copy-to {args.copy_to}: {error.strerror}")
    wanted = " ".join(args.copy_out)
    return files, None if files else InputError(f"--copy-out {wanted}: nothing in the guest matches")


def _stdin() -> int | None:
    """Our stdin when it is a pipe, a socket or a file: somebody meant the command to have it."""
    try:
        mode = os.fstat(0).st_mode
    except OSError:
        return None
    return 0 if stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode) else None


def _environment(settings: list[str]) -> dict[str, str]:
    env = {}
    for setting in settings:
        name, separator, value = setting.partition("=")
        if not separator or not name:
            raise InputError(f"--env {setting}: expected NAME=VALUE")
        env[name] = value
    return env


def _is_gone(outcome: Outcome) -> bool:
    from uspace_mm.guest.outcome import HarnessOutcome

    return isinstance(outcome, HarnessOutcome)


def _report(
    args: argparse.Namespace,
    outcome: Outcome,
    *,
    console: str,
    output: Collected | None = None,
    files: list[Path] | None = None,
    times: dict[str, float] | None = None,
    pages: int | None = None,
) -> int:
    from uspace_mm.guest.outcome import Exited, Panicked

    if args.json:
        record: dict[str, Any] = {
            "outcome": outcome.kind,
            "detail": str(outcome),
            "exit_status": outcome.exit_status,
            "page_size": pages,
            "files": [str(path) for path in files or []],
            **(times or {}),
            **(output.to_dict() if output else {}),
        }
        if isinstance(outcome, Panicked):
            record["oops"] = outcome.oops
        if _is_gone(outcome):
            record["console"] = console
        print(json.dumps(record, indent=2))
    elif not isinstance(outcome, Exited):
        if isinstance(outcome, Panicked):
            print(outcome.oops.rstrip(), file=sys.stderr)
        print(f"uspace-mm guest run: {outcome}", file=sys.stderr)
    return outcome.exit_status
