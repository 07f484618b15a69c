"""The report for programs: everything that was found, with its numbers."""

from __future__ import annotations

from typing import Any

from uspace_mm.elf.records import FileReport, Finding, Report, Segment, Status, Verdict


def render(report: Report) -> dict[str, Any]:
    """The report as JSON can hold it. Addresses, offsets and sizes are in bytes."""
    return {
        "machine": report.machine,
        "page_sizes": [size.name for size in report.page_sizes],
        "files": [_file(file) for file in report.files],
        "problems": [{"path": problem.name, "reason": problem.reason} for problem in report.problems],
        "summary": {
            "files": len(report.files),
            "failing": sum(file.worst.failing for file in report.files),
            "by_page_size": {
                size.name: {
                    status.value: sum(file.verdicts[index].status is status for file in report.files)
                    for status in Status
                }
                for index, size in enumerate(report.page_sizes)
            },
            "other_machines": report.other_machines,
            "not_loadable": report.not_loadable,
        },
        "exit_status": report.exit_status,
    }


def _file(file: FileReport) -> dict[str, Any]:
    image = file.image
    headers: dict[str, Any] = {}
    if image:
        headers = {
            "kind": image.kind.value,
            "libc": image.libc.value,
            "bits": image.bits,
            "interpreter": image.interp,
            "needed": list(image.needed),
            "soname": image.soname,
            "loads": [_segment(segment) for segment in image.loads],
            "relro": _segment(image.relro) if image.relro else None,
            "damage": list(image.damage),
        }
    return {
        "path": file.name,
        "machine": file.machine,
        **headers,
        "verdicts": [_verdict(verdict) for verdict in file.verdicts],
    }


def _segment(segment: Segment) -> dict[str, Any]:
    return {
        "index": segment.index,
        "offset": segment.offset,
        "vaddr": segment.vaddr,
        "filesz": segment.filesz,
        "memsz": segment.memsz,
        "rights": segment.rights,
        "align": segment.align,
    }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    told: dict[str, Any] = {
        "page_size": verdict.page_size.name,
        "status": verdict.status.value,
        "by_loader": {loader.value: status.value for loader, status in verdict.by_loader},
        "findings": [_finding(finding) for finding in verdict.findings],
    }
    if verdict.evidence:
        told["predicted"] = (verdict.predicted or verdict.status).value
        told["evidence"] = {
            "ok": verdict.evidence.ok,
            "compared": verdict.evidence.compared,
            "text": verdict.evidence.text,
        }
    return told


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "rule": finding.rule,
        "level": finding.level.name.lower(),
        "loader": finding.loader.value,
        "segment": finding.segment,
        "fact": finding.fact,
        "consequence": finding.consequence,
        "remedy": finding.remedy,
        "numbers": dict(finding.numbers),
    }
