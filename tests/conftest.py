"""Fixtures for all tests: each one has to leave the process and the machine as it found them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator, Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import hypothesis
import numpy as np
import pytest

from tests.leaks import everything, left_behind

# No test asserts a time: under emulation an example takes what it takes.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

FAILED = pytest.StashKey[bool]()

np.dot(np.ones(2), np.ones(2))  # numpy's worker threads start now, not in the first test that multiplies


@pytest.fixture(scope="session", autouse=True)
def own_temporary_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A TMPDIR of the run's own, so that a file left in it is known to be ours."""
    directory = tmp_path_factory.mktemp("t")
    before = os.environ.get("TMPDIR"), tempfile.tempdir
    os.environ["TMPDIR"] = tempfile.tempdir = str(directory)
    # multiprocessing starts it with the first shared memory or spawned child, and keeps it.
    resource_tracker.ensure_running()
    yield directory
    tempfile.tempdir = before[1]
    if before[0] is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = before[0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    return report


@pytest.fixture(autouse=True)
def leaves_nothing_behind(request: pytest.FixtureRequest, own_temporary_directory: Path) -> Iterator[None]:
    """Fail a test that leaves descriptors, threads, children or files; the message names them.

    A test that failed already is not asked: its traceback keeps its objects alive.
    """
    before = everything(own_temporary_directory)
    yield
    if request.node.stash.get(FAILED, False):
        return
    if left := left_behind(before, own_temporary_directory):
        pytest.fail("left behind:\n  " + "\n  ".join(left), pytrace=False)
