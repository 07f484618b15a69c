"""JUnit XML, which every CI shows: a suite per page size, a case per file."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from uspace_mm.elf.records import Report, Status, Verdict
from uspace_mm.elf.render.text import clean, facts

# What XML 1.0 has no way to write.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render(report: Report) -> str:
    """The report as an XML document."""
    root = ElementTree.Element("testsuites", name="uspace-mm elf audit")
    for index, size in enumerate(report.page_sizes):
        suite = ElementTree.SubElement(root, "testsuite", name=f"elf audit, pages of {size}")
        properties = ElementTree.SubElement(suite, "properties")
        ElementTree.SubElement(properties, "property", name="page_size", value=size.name)
        failures = skipped = 0
        for file in report.files:
            verdict = file.verdicts[index]
            case = ElementTree.SubElement(
                suite, "testcase", classname=f"elf.{size}", name=_text(file.name), time="0"
            )
            told = _told(verdict)
            if verdict.status.failing:
                failures += 1
                ElementTree.SubElement(case, "failure", message=verdict.status.value).text = told
            elif verdict.status is Status.UNKNOWN:
                skipped += 1
                ElementTree.SubElement(case, "skipped", message=told)
            elif told:
                ElementTree.SubElement(case, "system-out").text = told
        for problem in report.problems:
            case = ElementTree.SubElement(
                suite, "testcase", classname=f"elf.{size}", name=_text(problem.name), time="0"
            )
            ElementTree.SubElement(case, "error", message=_text(problem.reason))
        suite.set("tests", str(len(report.files) + len(report.problems)))
        suite.set("failures", str(failures))
        suite.set("errors", str(len(report.problems)))
        suite.set("skipped", str(skipped))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _told(verdict: Verdict) -> str:
    lines = []
    for text, finding in facts(verdict, notes=True):
        lines.append(f"{text}; to mend it: {finding.remedy}" if finding.remedy else text)
    if verdict.evidence:
        lines.append(f"in the guest: {verdict.evidence.text}")
    return _text("\n".join(lines))


def _text(text: str) -> str:
    return _FORBIDDEN.sub("?", "\n".join(clean(line) for line in text.split("\n")))
