"""One JUnit file for all page sizes, in the form that Jenkins, GitLab and pytest's own ``xunit2`` agree on.

A test suite per page size. The page size is a property of the suite and of each test case, and part of the
case's name (``test_x[16k]``, as the pytest plugin has it): readers tell cases apart by class name and name
alone.
"""

from __future__ import annotations

import re
import socket
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from uspace_mm.guest.testing.results import CaseResult, SizeResult
from uspace_mm.guest.testing.suite import SuiteResult

# XML 1.0 has no form for these at all.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write(result: SuiteResult, path: Path) -> None:
    """Write the file, its folder included; OSError as it comes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(document(result))


def document(result: SuiteResult) -> bytes:
    """The XML document, UTF-8."""
    suites = [_suite(size) for size in result.sizes]
    total = {name: str(sum(int(suite.get(name) or 0) for suite in suites)) for name in _COUNTS}
    root = ElementTree.Element(
        "testsuites", {"name": "guest tests", "time": _seconds(result.total_s), **total}
    )
    root.extend(suites)
    ElementTree.indent(root, " ")
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))


_COUNTS = ("tests", "failures", "errors")


def case_names(test: str, size: str) -> tuple[str, str]:
    """Class name and name: ``a/test_b.py::C::test_x[1]`` on 16k is ``a.test_b.C`` and ``test_x[1-16k]``."""
    path, _, rest = test.partition("::")
    module = path.removesuffix(".py").replace("/", ".")
    stem, bracket, parameters = rest.partition("[")
    *classes, name = stem.split("::")
    suffix = f"[{parameters[:-1]}-{size}]" if bracket else f"[{size}]"
    return ".".join((module, *classes)), (name or module) + suffix


def _suite(size: SizeResult) -> ElementTree.Element:
    counts = size.counts
    suite = ElementTree.Element(
        "testsuite",
        name=f"guest {size.size}",
        errors=str(counts.get("error", 0) + len(size.not_run) + len(size.problems)),
        failures=str(counts.get("failed", 0)),
        skipped=str(counts.get("skipped", 0) + counts.get("xfailed", 0)),
        tests=str(len({*size.tests, *size.not_run}) + len(size.problems)),
        time=_seconds(size.timings.total_s),
        timestamp=time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()),
        hostname=socket.gethostname(),
    )
    _properties(suite, page_size=size.size, page_size_bytes=str(size.page_size_bytes), **size.versions)
    for test in size.tests.values():
        if test.id not in size.not_run or test.bad:
            _case(suite, size.size, test)
    for name in size.not_run:
        if name not in size.tests or not size.tests[name].bad:
            why = size.problems[0] if size.problems else "the run ended before it"
            case = _case(suite, size.size, CaseResult(name))
            _text(case, "error", "not run", f"not run: {why}")
    for number, problem in enumerate(size.problems, 1):
        case = ElementTree.SubElement(
            suite, "testcase", classname="guest", name=f"harness {number}[{size.size}]", time="0.000"
        )
        _properties(case, page_size=size.size)
        _text(case, "error", "harness", problem)
    return suite


def _case(suite: ElementTree.Element, size: str, test: CaseResult) -> ElementTree.Element:
    classname, name = case_names(_clean(test.id), size)
    case = ElementTree.SubElement(
        suite, "testcase", classname=classname, name=name, time=_seconds(test.duration_s)
    )
    _properties(case, page_size=size)
    details = "\n\n".join(test.details)
    if test.status == "failed":
        _text(case, "failure", "", test.reason, details)
    elif test.status == "error":
        _text(case, "error", "", test.reason, details)
    elif test.status in ("skipped", "xfailed"):
        _text(case, "skipped", f"pytest.{'skip' if test.status == 'skipped' else 'xfail'}", test.reason)
    if test.bad:
        for tag, stream in (("system-out", "stdout"), ("system-err", "stderr")):
            found = [f"{heading}\n{text}" for heading, text in test.output if stream in heading]
            if found:
                ElementTree.SubElement(case, tag).text = _clean("\n".join(found))
    return case


def _text(case: ElementTree.Element, tag: str, kind: str, message: str, text: str = "") -> None:
    attributes = {"message": _clean(message), **({"type": kind} if kind else {})}
    ElementTree.SubElement(case, tag, attributes).text = _clean(text or message)


def _properties(parent: ElementTree.Element, **values: str) -> None:
    properties = ElementTree.SubElement(parent, "properties")
    for name, value in values.items():
        ElementTree.SubElement(properties, "property", name=name, value=_clean(value))


def _clean(text: str) -> str:
    return _FORBIDDEN.sub(lambda match: f"#x{ord(match[0]):02X}", text)


def _seconds(value: float) -> str:
    return f"{value:.3f}"
