"""``uspace-mm guest test -- pytest ...``: one test suite in guests with several page sizes."""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uspace_mm.guest.pagesize import PageSize
    from uspace_mm.guest.testing.job import Job
    from uspace_mm.guest.testing.project import Project
    from uspace_mm.guest.testing.size_run import Listener
    from uspace_mm.guest.testing.suite import SuiteResult


class Command:
    """Exit status 0: every test passed on every page size; 1: not so; 2: pytest refuses its arguments."""

    name = "test"
    help = "Run a project's tests under pytest in guests, one per page size, and show where they differ."

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        parser.usage = "uspace-mm guest test [options] [-- pytest ARGS]"
        add = parser.add_argument
        add("--page-size", default="all", metavar="SIZES", help="4k,16k,64k, or some of them (default: all)")
        add(
            "--junit", type=Path, metavar="FILE", help="write the results of all page sizes as one JUnit file"
        )
        add("--parallel", type=int, metavar="N", help="guests at once (default: by CPUs and memory)")
        add("--memory", default="1G", metavar="SIZE", help="of each guest (default: 1G)")
        add("--cpus", type=int, default=2, metavar="N", help="of each guest (default: 2)")
        add(
            "--project",
            type=Path,
            metavar="DIR",
            help="folder that travels (default: the project around here)",
        )
        add("--cpu", metavar="MODEL", help="of QEMU (default: the fastest with that page size)")
        for option, what in {
            "--kernel": "kernel image to boot for its page size, `built` (our own, default) or `debian`",
            "--overlay": "folder whose files are added at the guest's /",
            "--wheel": "wheel to install in the guest",
            "--pip": "package to install in the guest, as pip names it",
        }.items():
            add(option, action="append", default=[], metavar="VALUE", help=f"{what}; may be repeated")
        add("--timeout", default="30m", metavar="TIME", help="for all of a page size (default: 30m)")
        add("--test-timeout", default="2m", metavar="TIME", help="for one test (default: 2m)")
        add("--all-rows", action="store_true", help="show tests that are alike on all page sizes, too")
        add("--json", action="store_true", help="print one JSON document instead of text")
        add("pytest_args", nargs="*", metavar="ARGS", help="pytest's, as for `pytest ARGS` in this folder")

    def run(self, args: argparse.Namespace) -> int:
        from uspace_mm.cli._signals import termination_raises
        from uspace_mm.guest.pagesize import parse_page_sizes
        from uspace_mm.guest.testing.project import find_root, load
        from uspace_mm.guest.testing.suite import Interrupted
        from uspace_mm.guest.testing.text import summary

        sizes = parse_page_sizes(args.page_size)
        project = load(args.project or find_root(Path.cwd()))
        job = _job(args, project)
        if args.junit:
            _check_writable(args.junit)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # what tests say is not always text
        ended: BaseException | None = None
        try:
            with termination_raises():
                result = _run(args, sizes, project, job)
        except Interrupted as error:
            result, ended = error.result, error.__cause__
        if args.junit:
            _write_junit(result, args.junit)
        if args.json:
            print(json.dumps({"project": str(project.root), **result.as_json()}, indent=1))
        else:
            print()
            print(summary(result, all_rows=args.all_rows))
        if ended is not None:
            raise ended
        return result.exit_status


def _job(args: argparse.Namespace, project: Project) -> Job:
    from uspace_mm.guest.testing.job import Job, limits_for, translated
    from uspace_mm.guest.testing.project import source_paths
    from uspace_mm.guest.testing.times import parse_time

    return Job(
        args=tuple(translated(without_program(args.pytest_args), project.root)),
        cwd=project.inside(Path.cwd()) or ".",
        paths=source_paths(project),
        limits=limits_for(
            parse_time("--test-timeout", args.test_timeout), parse_time("--timeout", args.timeout)
        ),
    )


def without_program(words: Sequence[str]) -> list[str]:
    """`words` without the ``pytest`` or ``python -m pytest`` that they may begin with."""
    found = list(words)
    if found and Path(found[0]).name in ("pytest", "py.test"):
        return found[1:]
    if found[1:3] == ["-m", "pytest"] and Path(found[0]).name.startswith("python"):
        return found[3:]
    return found


def _run(args: argparse.Namespace, sizes: Sequence[PageSize], project: Project, job: Job) -> SuiteResult:
    from uspace_mm.errors import InputError
    from uspace_mm.guest.progress import on_terminal
    from uspace_mm.guest.testing.guests import Guests, Settings
    from uspace_mm.guest.testing.suite import run_sizes
    from uspace_mm.sizes import parse_size

    for option, value in (("--cpus", args.cpus), ("--parallel", args.parallel)):
        if value is not None and value < 1:
            raise InputError(f"{option} {value}: at least one is needed")
    settings = Settings(
        memory_bytes=parse_size(args.memory),
        cpus=args.cpus,
        cpu_model=args.cpu,
        kernels=tuple(args.kernel),
        wheels=tuple(map(Path, args.wheel)),
        pips=tuple(args.pip),
        overlays=tuple(map(Path, args.overlay)),
    )
    with on_terminal() as progress:
        guests = Guests(settings, project, sizes, progress)
    try:
        with _listener(args, sizes) as listener:
            return run_sizes(sizes, guests, job, listener, args.parallel or guests.parallel(len(sizes)))
    finally:
        guests.close()


@contextmanager
def _listener(args: argparse.Namespace, sizes: Sequence[PageSize]) -> Iterator[Listener]:
    from uspace_mm.guest.testing.live import Lines, Terminal
    from uspace_mm.guest.testing.size_run import Listener

    if args.json:
        yield Listener()
    elif sys.stdout.isatty():
        terminal = Terminal(sizes, width=shutil.get_terminal_size().columns - 1)
        try:
            yield terminal
        finally:
            terminal.close()
    else:
        yield Lines()


def _write_junit(result: SuiteResult, path: Path) -> None:
    from uspace_mm.errors import UspaceError
    from uspace_mm.guest.testing.junit import write

    try:
        write(result, path)
    except OSError as error:
        raise UspaceError(f"--junit {path}: {error.strerror}") from error


def _check_writable(path: Path) -> None:
    """Refuse a report that cannot be written before the guests are booted, and remove an old one."""
    from uspace_mm.errors import InputError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb"):
            pass
        path.unlink()
    except OSError as error:
        raise InputError(f"--junit {path}: {error.strerror}") from error
