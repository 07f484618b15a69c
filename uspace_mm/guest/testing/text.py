"""The end of a run as text: failures, the matrix of test and page size, durations."""

from __future__ import annotations

from collections.abc import Iterator

from uspace_mm.guest.testing.results import RANKS, CaseResult, SizeResult
from uspace_mm.guest.testing.suite import NOT_RUN, Row, SuiteResult

WIDTH = 100
# Of the tests that were not run, so many are named in one line each; --json and --junit have all.
NAMED = 20


def summary(result: SuiteResult, *, all_rows: bool = False, failures: bool = True) -> str:
    """Everything after the last test: ends with one line of counts."""
    parts = [
        list(_failures(result)) if failures else [],
        list(_matrix(result, all_rows)),
        list(_same_everywhere(result)),
        list(_problems(result)),
        list(_durations(result)),
        [_last_line(result)],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _failures(result: SuiteResult) -> Iterator[str]:
    """Each failing test once; sizes that say the same share the text."""
    for row in result.rows():
        groups: dict[str, list[tuple[str, CaseResult]]] = {}
        for size in result.sizes:
            test = size.tests.get(row.test)
            if test is not None and test.bad:
                groups.setdefault("\n\n".join(test.details), []).append((size.size, test))
        for details, members in groups.items():
            sizes = ", ".join(size for size, _ in members)
            yield f" {row.test} [{sizes}] ".center(WIDTH, "_")
            yield details
            for heading, text in members[0][1].output:
                if text.strip():
                    yield f" {heading} ".center(WIDTH, "-")
                    yield text.rstrip("\n")


def _matrix(result: SuiteResult, all_rows: bool) -> Iterator[str]:
    rows = [row for row in result.rows() if all_rows or row.differs]
    if not rows:
        return
    names = [size.size for size in result.sizes]
    width = max(len("test"), *(len(row.test) for row in rows))
    widths = [max(len(name), *(len(row.cells[i]) for row in rows)) for i, name in enumerate(names)]
    yield _line("test", width, names, widths)
    for row in rows:
        yield _line(row.test, width, [cell or "-" for cell in row.cells], widths)


def _line(first: str, width: int, cells: list[str], widths: list[int]) -> str:
    return "  ".join((first.ljust(width), *(c.ljust(w) for c, w in zip(cells, widths, strict=True)))).rstrip()


def _same_everywhere(result: SuiteResult) -> Iterator[str]:
    partial = [row for row in result.rows() if row.partial]
    rows = [row for row in result.rows() if not row.differs and not row.partial]
    bad = [row for row in rows if row.cells[0] in ("failed", "error")]
    if len(result.sizes) > 1 and rows:
        counts = _counted(rows)
        yield f"{_tests(len(rows))} alike on all page sizes: {counts}"
    if partial:
        yield f"{_tests(len(partial))} that only some page sizes have (--all-rows shows them)"
    for row in bad:
        yield f"  {row.cells[0]} on {_names(result)}: {row.test}"


def _tests(number: int) -> str:
    return f"{number} {'test' if number == 1 else 'tests'}"


def _counted(rows: list[Row]) -> str:
    order = (*RANKS, NOT_RUN, "")
    found = [row.cells[0] for row in rows]
    return ", ".join(f"{found.count(status)} {status}" for status in reversed(order) if status in found)


def _names(result: SuiteResult) -> str:
    return ", ".join(size.size for size in result.sizes)


def _problems(result: SuiteResult) -> Iterator[str]:
    for size in result.sizes:
        for problem in size.problems:
            yield f"{size.size}: {problem}"
        if not size.tests:
            if size.pytest_status == 5:
                yield f"{size.size}: pytest collected no tests"
            else:  # what pytest said to its arguments, or the console of a guest that did not come up
                yield from (f"{size.size}: {line}" for line in size.output.strip().splitlines()[-NAMED:])
        if size.not_run:
            yield f"{size.size}: {len(size.not_run)} not run:"
            yield from (f"  {name}" for name in size.not_run[:NAMED])
            if len(size.not_run) > NAMED:
                yield f"  and {len(size.not_run) - NAMED} more"


def _durations(result: SuiteResult) -> Iterator[str]:
    headings = ["boot", "collection", "tests", "total"]
    yield _line("", 6, headings, [9, 10, 9, 9])
    for size in result.sizes:
        timings = size.timings
        cells = [
            f"{value:.1f} s"
            for value in (timings.boot_s, timings.collection_s, timings.tests_s, timings.total_s)
        ]
        boots = f"  ({size.boots} boots)" if size.boots > 1 else ""
        yield _line(size.size, 6, cells, [9, 10, 9, 9]) + boots


def _last_line(result: SuiteResult) -> str:
    return f"{'; '.join(map(size_line, result.sizes))}; {result.total_s:.1f} s"


def size_line(size: SizeResult) -> str:
    """``16k: 1 failed, 3 passed``."""
    counts = [f"{number} {status}" for status, number in size.counts.items()]
    if size.not_run:
        counts.append(f"{len(size.not_run)} not run")
    return f"{size.size}: {', '.join(counts) or 'nothing ran'}"
