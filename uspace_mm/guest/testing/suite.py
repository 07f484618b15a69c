"""One job on several page sizes: side by side as far as CPUs and memory go, and what came of all."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from typing import Any

from uspace_mm.guest.pagesize import PageSize
from uspace_mm.guest.testing.job import Job
from uspace_mm.guest.testing.machine import Boot
from uspace_mm.guest.testing.results import BAD, CaseResult, SizeResult
from uspace_mm.guest.testing.size_run import Listener, SizeRun

# What QEMU needs beside the guest's memory: translated code, mostly.
QEMU_BYTES = 400 << 20
NOT_RUN = "not run"
ABSENT = ""


@dataclass
class SuiteResult:
    """The results of all sizes, in the order asked for; ``total_s`` is the time the whole took."""

    sizes: list[SizeResult] = field(default_factory=list)
    total_s: float = 0.0

    @property
    def exit_status(self) -> int:
        """0 when all passed everywhere, 2 when pytest refused its arguments everywhere, else 1."""
        statuses = {size.exit_status for size in self.sizes}
        return statuses.pop() if len(statuses) == 1 else 1

    def rows(self) -> list[Row]:
        """Every test with its status on each size, in the order in which they were planned."""
        planned = [test for size in self.sizes for test in (*size.planned, *size.tests, *size.not_run)]
        return [self._row(test) for test in dict.fromkeys(planned)]

    def _row(self, test: str) -> Row:
        cells = []
        for size in self.sizes:
            result = size.tests.get(test)
            if test in size.not_run and (result is None or not result.bad):
                cells.append(NOT_RUN)
            else:
                cells.append(ABSENT if result is None else result.status)
        return Row(test, tuple(cells))

    def as_json(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return {
            "exit_status": self.exit_status,
            "total_s": round(self.total_s, 3),
            "page_sizes": [_size_json(size) for size in self.sizes],
            "differ": [
                {"id": row.test, "status": dict(zip((s.size for s in self.sizes), row.cells, strict=True))}
                for row in self.rows()
                if row.differs
            ],
        }


@dataclass(frozen=True)
class Row:
    """A line of the matrix: a status per page size, empty where the test was not among those collected."""

    test: str
    cells: tuple[str, ...]

    @property
    def partial(self) -> bool:
        """Whether only some page sizes have it, and there all is well: its name depends on the page size."""
        found = {cell for cell in self.cells if cell != ABSENT}
        return ABSENT in self.cells and len(found) == 1 and not found & {*BAD, NOT_RUN}

    @property
    def differs(self) -> bool:
        return len(set(self.cells)) > 1 and not self.partial


def side_by_side(sizes: int, *, memory_bytes: int, cpus: int, available_bytes: int) -> int:
    """How many guests to run at once: one more than there are CPUs, as each of them waits now and then."""
    fit = int(available_bytes * 0.8) // (memory_bytes + QEMU_BYTES)
    return max(1, min(sizes, cpus + 1, fit))


class Interrupted(Exception):
    """Something ended the run: ``__cause__``. ``result`` is what is known; the guests are gone."""

    def __init__(self, result: SuiteResult) -> None:
        super().__init__("interrupted")
        self.result = result


def run_sizes(
    sizes: Sequence[PageSize], boot: Boot, job: Job, listener: Listener, parallel: int
) -> SuiteResult:
    """Run `job` on each of `sizes`, `parallel` at once.

    An error of the host's making (:class:`uspace_mm.errors.UspaceError`) ends all of them and is raised;
    KeyboardInterrupt and SystemExit do as :class:`Interrupted`.
    """
    started = time.monotonic()
    runs = [SizeRun(size, boot, job, listener) for size in sizes]
    with ThreadPoolExecutor(max(1, parallel), thread_name_prefix="umm-size") as pool:
        futures: list[Future[SizeResult]] = [pool.submit(run.go) for run in runs]
        try:
            _wait_for(futures)
        except BaseException as error:
            for future, run in zip(futures, runs, strict=True):
                future.cancel()
                run.stop()
            wait(futures)
            if isinstance(error, Exception):
                raise
            result = SuiteResult([run.result for run in runs], time.monotonic() - started)
            raise Interrupted(result) from error
    result = SuiteResult([future.result() for future in futures])
    result.total_s = time.monotonic() - started
    return result


def _wait_for(futures: Sequence[Future[SizeResult]]) -> None:
    pending = set(futures)
    while pending:
        # A wait without a limit would keep an interrupt waiting as well.
        done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()


def _size_json(size: SizeResult) -> dict[str, Any]:
    return {
        "page_size": size.size,
        "page_size_bytes": size.page_size_bytes,
        "exit_status": size.exit_status,
        "counts": size.counts,
        "problems": size.problems,
        "not_run": size.not_run,
        "boots": size.boots,
        "pytest_status": size.pytest_status,
        "timings": {name: round(value, 3) for name, value in asdict(size.timings).items()},
        "versions": size.versions,
        "warnings": [
            {key: warning.get(key) for key in ("message", "category", "filename", "lineno", "id")}
            for warning in size.warnings
        ],
        "tests": [_test_json(test) for test in size.tests.values()],
        "output": size.output if size.exit_status and not size.tests else "",
    }


def _test_json(test: CaseResult) -> dict[str, Any]:
    data = asdict(test)
    del data["finished"], data["started_s"]
    if not test.bad:
        del data["output"]
    return {**data, "duration_s": round(test.duration_s, 4)}
