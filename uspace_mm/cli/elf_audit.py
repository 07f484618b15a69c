"""``uspace-mm elf audit``: a verdict on every ELF file under some paths, for each page size."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from uspace_mm.errors import InputError, UspaceError

if TYPE_CHECKING:
    from uspace_mm.elf.records import Report
    from uspace_mm.guest.progress import Progress


class Command:
    """Judges files, directories, wheels, packages and container layers."""

    name = "audit"
    help = "Judge the ELF files in files, directories, wheels, Debian packages, tars and container layers."

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "paths", nargs="+", metavar="PATH", type=Path, help="file, directory or archive to look into"
        )
        parser.add_argument(
            "--page-size", default="all", metavar="LIST", help="judge for these (default: 4k,16k,64k)"
        )
        parser.add_argument(
            "--machine", default="aarch64", metavar="NAME", help="aarch64 (default), x86_64, ..., or any"
        )
        parser.add_argument(
            "--all", action="store_true", help="list files that load and lost protections as well"
        )
        parser.add_argument("--json", action="store_true", help="print everything that was found as JSON")
        parser.add_argument("--sarif", metavar="FILE", help="write SARIF 2.1.0 to FILE, - for stdout")
        parser.add_argument("--junit", metavar="FILE", help="write JUnit XML to FILE, - for stdout")

        parser.add_argument(
            "--prove",
            action="store_true",
            help="load what is not plainly fine in guests, and compare memory with the file",
        )
        parser.add_argument(
            "--kernel", metavar="KERNEL", help="for --prove: built (default), debian, or an image of a kernel"
        )

    def run(self, args: argparse.Namespace) -> int:
        from uspace_mm.elf.audit import audit
        from uspace_mm.guest.pagesize import parse_page_sizes
        from uspace_mm.guest.progress import on_terminal

        if [args.sarif, args.junit].count("-") + args.json > 1:
            raise InputError("only one of --json, --sarif - and --junit - can go to stdout")
        with on_terminal() as progress:
            report = audit(
                args.paths, parse_page_sizes(args.page_size), machine=args.machine, progress=progress
            )
            failed = _prove(report, args.kernel, progress) if args.prove else None
        _write(args, report)
        if not report.files and not report.problems:
            print(f"uspace-mm elf: {_nothing(report, args.paths)}", file=sys.stderr)
        if failed is not None:
            raise failed
        return report.exit_status


def _prove(report: Report, kernel: str | None, progress: Progress) -> UspaceError | None:
    """What kept guests from running: the verdicts of the rules are worth printing all the same."""
    from uspace_mm.elf.prove import prove

    try:
        prove(report, kernel=kernel, progress=progress)
    except UspaceError as error:
        return error
    return None


def _write(args: argparse.Namespace, report: Report) -> None:
    from uspace_mm.elf.render import json as json_form
    from uspace_mm.elf.render import junit, sarif, text

    if args.sarif:
        _to(args.sarif, json.dumps(sarif.render(report), indent=2) + "\n")
    if args.junit:
        _to(args.junit, junit.render(report))
    if args.json:
        print(json.dumps(json_form.render(report), indent=2))
    elif "-" not in (args.sarif, args.junit):
        lines = text.render(report, width=shutil.get_terminal_size().columns, everything=args.all)
        # Names may hold what the terminal's encoding has no way to write.
        encoding = sys.stdout.encoding or "utf-8"
        print(lines.encode(encoding, "backslashreplace").decode(encoding))


def _to(name: str, document: str) -> None:
    if name == "-":
        sys.stdout.write(document)
        return
    try:
        Path(name).write_text(document, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {name}: {error.strerror}") from error


def _nothing(report: Report, paths: list[Path]) -> str:
    told = f"no ELF file for {report.machine} in {', '.join(map(str, paths[:3]))}"
    if len(paths) > 3:
        told += f" and {len(paths) - 3} more"
    if report.other_machines:
        return f"{told}; there are some for {', '.join(sorted(report.other_machines))}: give --machine"
    return f"{told}: give a file, a directory or an archive that holds one"
