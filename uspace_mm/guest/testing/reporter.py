"""The pytest plugin inside the guest: every start, report and warning goes to the host at once.

It is loaded as a module of its own (``-p umm_reporter``) from a folder that holds nothing else but the
driver, so it knows the standard library and pytest, and nothing of the package. What it writes is one line
per record, ``@umm CRC JSON`` with the CRC-32 of the JSON text in hexadecimal, so that the host can tell
records from whatever else a test writes to the descriptor. Text without that form is a stack dump of
faulthandler, or garbage; records.py is the other side. PYTEST_DONT_REWRITE
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import platform
import sys
import threading
import warnings
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

# What the driver was asked to do (see driver.py); None in processes that it did not start, as xdist's
# workers.
JOB: dict[str, Any] | None = None
# More than that of one captured stream is cut in the middle: the host keeps the reports of all sizes in
# memory.
SECTION_MAX = 4 << 20
# Options of the host's plugin, and settings of the same names.
HOST_OPTIONS = (
    *("page-sizes", "memory", "cpus", "kernel", "wheel", "pip"),
    *("overlay", "project", "test-timeout"),
)
CLOSED = 71  # exit status: a test closed the descriptor, so no result can be reported any more


class Channel:
    """The report descriptor, kept away from the tests as far as one process can."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._pid = os.getpid()
        self._identity = self._identify()
        self._lock = threading.Lock()

    def _identify(self) -> tuple[int, int]:
        status = os.fstat(self.descriptor)
        return status.st_dev, status.st_ino

    def write(self, kind: str, **fields: object) -> None:
        """One record; a process that a test forked does not speak for its parent."""
        if os.getpid() != self._pid:
            return
        text = json.dumps({"kind": kind, **fields}, default=str).encode()
        line = b"\n@umm %08x %s\n" % (zlib.crc32(text), text)
        with self._lock:
            try:
                if self._identify() != self._identity:
                    raise OSError("the descriptor is another file now")
                while line:
                    line = line[os.write(self.descriptor, line) :]
            except OSError:
                os._exit(CLOSED)


class Reporter:
    """The hooks. Where xdist distributes the tests (``-n``), they are those of its controller."""

    def __init__(self, config: pytest.Config, channel: Channel, job: dict[str, Any]) -> None:
        self._config = config
        self._channel = channel
        self._test_s = float(job.get("test_timeout_s") or 0)
        self._collect_s = float(job.get("collect_timeout_s") or 0)
        self._only: list[str] | None = job.get("only")
        self._ignored = set(job.get("ignore", ()))
        self._pid = os.getpid()
        self._announced = False

    def _arm(self, limit_s: float) -> None:
        # A thread in C, which needs no GIL: it dumps all stacks and ends the process.
        if limit_s:
            faulthandler.dump_traceback_later(limit_s, exit=True, file=self._channel.descriptor)

    def _disarm(self) -> None:
        faulthandler.cancel_dump_traceback_later()

    @pytest.hookimpl(trylast=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        # After pytest's own plugin, so that the stacks of a crash come this way.
        faulthandler.enable(file=self._channel.descriptor)
        self._channel.write(
            "session",
            page_size=os.sysconf("SC_PAGE_SIZE"),
            python=platform.python_version(),
            pytest=pytest.__version__,
            kernel=platform.release(),
            machine=platform.machine(),
            rootdir=str(session.config.rootpath),
            maxfail=session.config.getvalue("maxfail"),
            pid=os.getpid(),
        )

    @pytest.hookimpl(tryfirst=True)
    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        name = os.path.relpath(collection_path, self._config.rootpath)
        return True if name in self._ignored else None

    def pytest_collectstart(self, collector: pytest.Collector) -> None:
        self._channel.write("collecting", id=collector.nodeid, file=isinstance(collector, pytest.File))
        self._arm(self._collect_s)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._disarm()
        if not report.passed:
            self._report(report)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> Generator[None, None, None]:
        yield
        if self._only is None:
            return
        order = {nodeid: index for index, nodeid in enumerate(self._only)}
        found = {item.nodeid for item in items}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in order])
        items[:] = sorted((i for i in items if i.nodeid in order), key=lambda i: order[i.nodeid])
        missing = [nodeid for nodeid in self._only if nodeid not in found]
        if missing:
            self._channel.write("missing", ids=missing)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items or not self._config.pluginmanager.hasplugin("dsession"):
            self._channel.write("items", ids=[item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        if not self._announced:
            self._announced = True
            self._channel.write("items", ids=list(ids))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        self._arm(self._test_s)
        try:
            return (yield)
        finally:
            self._disarm()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[object]) -> None:
        # A child that a test forked and that came out of the test would run all the rest once more, unheard.
        if os.getpid() != self._pid:
            error = call.excinfo.value if call.excinfo else None
            code = error.code if isinstance(error, SystemExit) else int(error is not None)
            os._exit(code if isinstance(code, int) else int(code is not None))

    def pytest_runtest_logstart(self, nodeid: str, location: tuple[str, int | None, str]) -> None:
        self._channel.write("start", id=nodeid, location=location)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._channel.write("finish", id=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._report(report)

    def _report(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        hook = self._config.hook
        data = hook.pytest_report_to_serializable(config=self._config, report=report)
        if data is None:
            return
        data["sections"] = [(name, _cut(text)) for name, text in report.sections]
        try:
            category = hook.pytest_report_teststatus(report=report, config=self._config)[0]
        except Exception:  # a plugin of the project; the outcome itself is in the report
            category = report.outcome
        self._channel.write("report", report=data, category=category, text=_cut(report.longreprtext))

    def pytest_warning_recorded(
        self,
        warning_message: warnings.WarningMessage,
        when: str,
        nodeid: str,
        location: tuple[str, int, str] | None,
    ) -> None:
        category = warning_message.category
        self._channel.write(
            "warning",
            message=str(warning_message.message),
            module=category.__module__,
            category=category.__name__,
            filename=warning_message.filename,
            lineno=warning_message.lineno,
            when=when,
            id=nodeid,
            location=location,
        )

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        self._channel.write("interrupt", name=excinfo.typename, text=str(excinfo.value))

    def pytest_internalerror(self, excrepr: object) -> None:
        self._channel.write("internal error", text=_cut(str(excrepr)))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        stopped = session.shouldfail or session.shouldstop
        self._channel.write("end", status=int(exitstatus), stopped=str(stopped) if stopped else "")


class Quiet:
    """The terminal's reporter prints nowhere: the host has its own, ``-s`` wants the tests' output."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        terminal = session.config.pluginmanager.getplugin("terminalreporter")
        if terminal is not None:
            terminal._tw._file = io.StringIO()


def _cut(text: str) -> str:
    if len(text) <= SECTION_MAX:
        return text
    half = SECTION_MAX // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"


def pytest_addoption(parser: pytest.Parser) -> None:
    # A project may name them in its addopts.
    if JOB is not None or "uspace_mm.guest.testing.plugin" not in sys.modules:
        group = parser.getgroup("guest")
        for option in HOST_OPTIONS:
            group.addoption(f"--guest-{option}", action="append", default=None)
            parser.addini(f"guest_{option.replace('-', '_')}", "for the host", type="args", default=[])


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "pagesize(*sizes): runs in guests with these page sizes (on the host)")
    if JOB is not None and not hasattr(config, "workerinput"):
        vars(config.option).update(JOB.get("options") or {})
        descriptor = JOB["descriptor"]
        if JOB.get("options") is not None:
            config.pluginmanager.register(Quiet(), "umm-quiet")
        config.pluginmanager.register(Reporter(config, Channel(descriptor), JOB), "umm-reporter-hooks")
