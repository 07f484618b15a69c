"""SARIF 2.1.0 (OASIS), which code hosts show beside the change that brought a finding."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any
from urllib.parse import quote

from uspace_mm import __version__
from uspace_mm.elf.records import FileReport, Finding, Level, Report
from uspace_mm.elf.render.text import clean, facts

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/os/schemas/sarif-schema-2.1.0.json"

RULES = {
    "congruence": "p_vaddr and p_offset of a LOAD segment must differ by a multiple of the page size.",
    "p-align": "p_align of a LOAD segment must be a multiple of the page size for glibc before 2.35.",
    "overlap": "LOAD segments that share a page must agree about its bytes and its rights.",
    "relro": "PT_GNU_RELRO must begin and end where pages do.",
    "jemalloc": "jemalloc that was compiled for smaller pages aborts at start.",
    "format": "The headers of an ELF file must be readable and must not contradict each other.",
    "guest": "What happened when the file was loaded in a guest of that page size.",
    "not-looked-into": "A file or archive could not be looked into.",
}
_LEVELS = {Level.NOTE: "note", Level.UNKNOWN: "warning", Level.WRONG: "error", Level.FAILS: "error"}


def render(report: Report) -> dict[str, Any]:
    """The report as a SARIF log with one run."""
    results = [result for file in report.files for result in _results(file)]
    results += [
        _result("not-looked-into", "error", f"not looked into: {problem.reason}", problem.name)
        for problem in report.problems
    ]
    return {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "uspace-mm elf audit",
                        "version": __version__,
                        "rules": [
                            {"id": rule, "shortDescription": {"text": text}} for rule, text in RULES.items()
                        ],
                    }
                },
                "columnKind": "unicodeCodePoints",
                "results": results,
            }
        ],
    }


def _results(file: FileReport) -> list[dict[str, Any]]:
    merged: dict[str, tuple[Finding, list[str]]] = {}
    for verdict in file.verdicts:
        for text, finding in facts(verdict, notes=True):
            merged.setdefault(text, (finding, []))[1].append(verdict.page_size.name)
    results = []
    for text, (finding, sizes) in merged.items():
        message = f"Pages of {', '.join(sizes)}: {text}."
        if finding.remedy and finding.level is not Level.NOTE:
            message += f" To mend it: {finding.remedy}."
        result = _result(finding.rule, _level(finding, file), message, file.name)
        result["properties"] = {"pageSizes": sizes, **dict(finding.numbers)}
        results.append(result)
    for verdict in file.verdicts:
        if verdict.evidence and verdict.evidence.ok is False:
            text = f"Pages of {verdict.page_size}: in the guest: {verdict.evidence.text}."
            results.append(_result("guest", "error", text, file.name))
    return results


def _level(finding: Finding, file: FileReport) -> str:
    # What only an older glibc refuses is a warning: the file's verdict is that it loads.
    return (
        "warning" if _LEVELS[finding.level] == "error" and not file.worst.failing else _LEVELS[finding.level]
    )


def _result(rule: str, level: str, text: str, name: str) -> dict[str, Any]:
    path, _, member = name.partition("!")
    location: dict[str, Any] = {"physicalLocation": {"artifactLocation": {"uri": _uri(path)}}}
    if member:
        location["logicalLocations"] = [{"fullyQualifiedName": clean(member), "kind": "member"}]
    return {
        "ruleId": rule,
        "ruleIndex": list(RULES).index(rule),
        "level": level,
        "message": {"text": clean(text)},
        "locations": [location],
    }


def _uri(path: str) -> str:
    pure = PurePath(path)
    data = path.encode("utf-8", "surrogateescape")
    return f"file://{quote(data)}" if pure.is_absolute() else quote(data)
