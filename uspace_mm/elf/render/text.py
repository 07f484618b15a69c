"""The table for people: a line per file, what was found below it, in the width of the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from uspace_mm.elf.records import FileReport, Finding, Level, Loader, Report, Status, Verdict

_WORDS = {
    Status.LOADS: "loads",
    Status.NEWER_GLIBC: "glibc2.35+",
    Status.UNKNOWN: "unknown",
    Status.WRONG: "WRONG",
    Status.FAILS: "FAILS",
}
_COLUMN = 11
_NARROWEST = 40


def render(report: Report, *, width: int = 80, everything: bool = False) -> str:
    """The report in lines of at most `width` characters; files that simply load only with `everything`."""
    width = max(width, _NARROWEST)
    shown = [file for file in report.files if everything or _has_news(file)]
    lines: list[str] = []
    if shown:
        lines.append("".join(f"{size!s:<{_COLUMN}}" for size in report.page_sizes) + "file")
    for file in shown:
        lines += _file(file, width, everything)
    for problem in report.problems:
        lines += _wrap(f"not looked into: {clean(problem.name)}: {clean(problem.reason)}", width, "  ")
    if lines:
        lines.append("")
    lines += [line for text in _summary(report) for line in _wrap(text, width, "  ")]
    return "\n".join(lines)


def _has_news(file: FileReport) -> bool:
    return file.worst is not Status.LOADS or any(verdict.evidence for verdict in file.verdicts)


def clean(text: str) -> str:
    """`text` without characters that a terminal obeys: names come from archives that strangers made."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def facts(verdict: Verdict, *, notes: bool) -> Iterator[tuple[str, Finding]]:
    """Each fact of a verdict once, with what each loader does about it, and the first finding of it."""
    merged: dict[tuple[str, str], list[Finding]] = {}
    # What older glibc refuses besides is no news about a file that newer glibc refuses, too.
    for finding in verdict.findings:
        if not notes and verdict.status.failing and finding.loader is Loader.GLIBC_OLD:
            continue
        if notes or finding.level is not Level.NOTE:
            merged.setdefault((finding.rule, finding.fact), []).append(finding)
    for (rule, fact), findings in merged.items():
        consequences: dict[str, list[str]] = {}
        for finding in findings:
            consequences.setdefault(finding.consequence, []).append(finding.loader.value)
        told = "; ".join(f"{', '.join(who)}: {what}" for what, who in consequences.items())
        yield f"{rule}: {fact}: {told}", findings[0]


def _file(file: FileReport, width: int, everything: bool) -> list[str]:
    words = "".join(f"{_WORDS[verdict.status]:<{_COLUMN}}" for verdict in file.verdicts)
    lines = _wrap(words + clean(file.name), width, "    ")
    remedies: dict[str, None] = {}
    told: dict[str, list[str]] = {}
    for verdict in file.verdicts:
        for text, finding in facts(verdict, notes=everything):
            told.setdefault(text, []).append(str(verdict.page_size))
            if finding.remedy and finding.level is not Level.NOTE and verdict.status is not Status.LOADS:
                remedies[finding.remedy] = None
        if verdict.evidence:
            told.setdefault(f"in the guest: {verdict.evidence.text}", []).append(str(verdict.page_size))
    for text, sizes in told.items():
        lines += _wrap(f"  {', '.join(sizes)}  {clean(text)}", width, "      ")
    for remedy in remedies:
        lines += _wrap(f"  to mend it: {remedy}", width, "      ")
    return lines


def _summary(report: Report) -> Iterator[str]:
    if not report.files:
        yield f"no ELF file for {report.machine} found"
    else:
        yield f"{len(report.files)} ELF files" + ("" if report.machine == "any" else f" for {report.machine}")
    for index, size in enumerate(report.page_sizes):
        counts: dict[Status, int] = {}
        for file in report.files:
            status = file.verdicts[index].status
            counts[status] = counts.get(status, 0) + 1
        if counts:
            told = ", ".join(f"{counts[status]} {status.value}" for status in Status if status in counts)
            yield f"  {size!s:<4} {told}"
    if report.other_machines:
        others = ", ".join(f"{count} for {name}" for name, count in sorted(report.other_machines.items()))
        yield f"left out: {others} (--machine NAME or any judges them)"
    if report.not_loadable:
        yield f"left out: {report.not_loadable} object files and the like, which are not loaded"
    if report.problems:
        yield f"not looked into: {len(report.problems)} files or archives, see above"


def _wrap(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        subsequent_indent=indent,
        drop_whitespace=True,
        break_on_hyphens=False,
        replace_whitespace=False,
    ) or [""]
